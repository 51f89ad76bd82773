"""jaxq as a model of lm-eval: `--model jaxq --model_args path=DIR,...`.

lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) brings the tasks
and their metrics and asks a model three things: log-likelihoods of
continuations, of whole texts, and texts generated up to a stop string. This is
that model for whatever `models.load` reads; the work is in jaxq.eval.harness.

Conventions are those of lm-eval's own transformers backend, so that the numbers
can be compared: special tokens as the tokenizer adds them unless add_bos_token
says otherwise, the BOS (without one, the end-of-text token) before an empty
context and at the head of a rolling text, truncation on the left.

Needs the extra `eval`. lm-eval 0.4.13 knows the models of its own source tree
only; experiments.harness is its command line with this one registered.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import tqdm
from lm_eval import utils
from lm_eval.api import instance as instance_lib
from lm_eval.api import model as model_lib

import models
from experiments import adapters
from jaxq.decode import sampling as sampling_lib
from jaxq.eval import harness
from jaxq.parallel import mesh as mesh_lib

Requests = list[instance_lib.Instance]

# What a task may say of a generation, and what it is called here.
_LENGTHS = (
  'max_gen_toks',
  'max_new_tokens',
  'max_tokens',
  'max_completion_tokens',
)
_GENERATION = (
  *_LENGTHS,
  *('do_sample', 'temperature', 'top_k', 'top_p', 'until'),
)


class JaxqLM(model_lib.TemplateLM):
  """A jaxq model behind lm-eval's interface."""

  backend = 'causal'

  def __init__(
    self,
    path: str,
    batch_size: int | str = 8,
    dtype: str = 'float32',
    mesh: str = '',
    max_length: int | str | None = None,
    max_gen_toks: int | str = 256,
    add_bos_token: bool | None = None,
    seed: int | str = 0,
    device: str | None = None,
    max_batch_size: int | str | None = None,
  ):
    """Loads a model.

    Args:
      path: packaged name, .gguf file, Hugging Face or jaxq directory.
      batch_size: rows of a step.
      dtype: of float weights and activations.
      mesh: as in data:2+model:4 (lm-eval splits arguments at commas); '' is
        one device.
      max_length: longest sequence; None: the model's own.
      max_gen_toks: new tokens where a task does not say.
      add_bos_token: whether the tokenizer adds its special tokens; None: as
        it is made, but no second BOS.
      seed: of sampled generation.
      device, max_batch_size: what lm-eval passes; JAX_PLATFORMS chooses the
        device, and the batch size is fixed.

    Raises:
      ValueError: as models.load; batch_size is no number.
    """
    super().__init__()
    del device, max_batch_size
    self._mesh = mesh_lib.make_mesh(mesh.replace('+', ',')) if mesh else None
    self._model = models.load(path, dtype, self._mesh)
    longest = self._model.config.max_position
    self._config = harness.HarnessConfig(
      batch_size=_whole('batch_size', batch_size),
      max_length=(
        longest if max_length is None else _whole('max_length', max_length)
      ),
    )
    if self._config.max_length > longest:
      raise ValueError(
        f'max_length={max_length}; {path} takes sequences of at most {longest} '
        'tokens. Give a smaller one.'
      )
    self._max_gen_toks = _whole('max_gen_toks', max_gen_toks)
    self._add_bos = add_bos_token
    self._seed = _whole('seed', seed)

  @classmethod
  def create_from_arg_string(
    cls, arg_string: str, additional_config: dict | None = None
  ) -> 'JaxqLM':
    """As lm-eval makes it; --model_args win over flags of the same name."""
    given = utils.simple_parse_args_string(arg_string)
    return cls.create_from_arg_obj(given, additional_config)

  @classmethod
  def create_from_arg_obj(
    cls, arg_dict: dict, additional_config: dict | None = None
  ) -> 'JaxqLM':
    """The same from a dict."""
    flags = additional_config or {}
    kept = {name: value for name, value in flags.items() if value is not None}
    return cls(**{**kept, **arg_dict})

  @property
  def eot_token_id(self) -> int:
    """The first token that ends a text."""
    stops = self._model.config.eos_token_ids
    if not stops:
      raise ValueError(
        f'{self._model.name}: its config names no eos_token_id, which lm-eval '
        'needs. Add it to config.json.'
      )
    return stops[0]

  @property
  def prefix_token_id(self) -> int:
    """What stands before an empty context: BOS, or end of text."""
    bos = self._model.config.bos_token_id
    return self.eot_token_id if bos is None else bos

  @property
  def max_length(self) -> int:
    """The longest sequence."""
    return self._config.max_length

  @property
  def tokenizer_name(self) -> str:
    """Part of the key of lm-eval's cache."""
    return self._model.name

  def tok_encode(
    self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Text to ids; special tokens in it are understood."""
    del kwargs  # What other backends pass to their tokenizers.
    tokenizer, add = self._model.tokenizer, add_special_tokens
    if add is None:
      prefix = tokenizer.decode(
        [self.prefix_token_id], skip_special_tokens=False
      )
      begun = bool(prefix) and string.startswith(prefix)
      add = False if begun else self._add_bos
    add = True if add is None else add
    return tokenizer.encode(string, add_special_tokens=add).ids

  def loglikelihood_rolling(
    self, requests: Requests, disable_tqdm: bool = False
  ) -> list[float]:
    """log p of whole texts, in windows that predict every token once."""
    windows: list[tuple[list[int], list[int]]] = []
    counts = []
    for request in requests:
      rolling = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.max_length,
        context_len=1,
      )
      made = [utils.make_disjoint_window(window) for window in rolling]
      windows += [(list(a), list(b)) for a, b in made]
      counts.append(len(made))
    scores = iter(self._score(windows, disable_tqdm))
    totals = [
      sum(next(scores).log_likelihood for _ in range(n)) for n in counts
    ]
    for request, total in zip(requests, totals, strict=True):
      self.cache_hook.add_partial('loglikelihood_rolling', request.args, total)
    return totals

  def generate_until(
    self, requests: Requests, disable_tqdm: bool = False
  ) -> list[str]:
    """Texts up to their stop strings; equal settings share batches."""
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(requests):
      key = json.dumps(request.args[1], sort_keys=True)
      groups.setdefault(key, []).append(i)
    texts, before = [''] * len(requests), 0
    with _bar(len(requests), disable_tqdm) as bar:
      for key, members in groups.items():
        made = self._generate(
          [self.tok_encode(requests[i].args[0]) for i in members],
          json.loads(key),
          lambda done, num, before=before: bar.update(before + done - bar.n),
        )
        for i, text in zip(members, made, strict=True):
          texts[i] = text
        before += len(members)
    for request, text in zip(requests, texts, strict=True):
      self.cache_hook.add_partial('generate_until', request.args, text)
    return texts

  def _loglikelihood_tokens(
    self,
    requests: list[tuple[tuple[str, str], list[int], list[int]]],
    disable_tqdm: bool = False,
    **kwargs: Any,
  ) -> list[tuple[float, bool]]:
    """What TemplateLM.loglikelihood makes of its requests."""
    del kwargs
    pairs = [(context, continuation) for _, context, continuation in requests]
    scores = self._score(pairs, disable_tqdm)
    answers = [(s.log_likelihood, s.greedy) for s in scores]
    for (key, _, _), answer in zip(requests, answers, strict=True):
      if key is not None:
        self.cache_hook.add_partial('loglikelihood', key, answer)
    return answers

  def _score(self, pairs, disable_tqdm) -> list[harness.Score]:
    with _bar(len(pairs), disable_tqdm) as bar:
      return harness.loglikelihoods(
        adapters.scorer(self._model.module),
        self._model.variables,
        pairs,
        self._config,
        mesh=self._mesh,
        progress=lambda done, num: bar.update(done - bar.n),
      )

  def _generate(
    self, prompts: Sequence[list[int]], settings: Mapping[str, Any], progress
  ) -> list[str]:
    unknown = sorted(set(settings) - set(_GENERATION))
    if unknown:
      raise ValueError(
        f'generation_kwargs: {unknown}; jaxq takes {sorted(_GENERATION)}. Take '
        'the others out of the task.'
      )
    until = settings.get('until') or []
    given = [settings[name] for name in _LENGTHS if name in settings]
    return harness.generate_until(
      adapters.language_model(self._model.module),
      self._model.variables,
      prompts,
      self._model.tokenizer.decode,
      self._config,
      until=[until] if isinstance(until, str) else until,
      max_new_tokens=int(given[0]) if given else self._max_gen_toks,
      sampling=sampling(settings),
      seed=self._seed,
      mesh=self._mesh,
      progress=progress,
    )


def sampling(settings: Mapping[str, Any]) -> sampling_lib.Sampling:
  """How tokens are chosen, from a task's generation_kwargs.

  Greedy unless the task asks to sample: by do_sample, or by a temperature
  above 0 where do_sample is not given.
  """
  temperature = float(settings.get('temperature') or 0.0)
  do_sample = settings.get('do_sample', temperature > 0)
  if not do_sample:
    return sampling_lib.GREEDY
  return sampling_lib.Sampling(
    temperature=temperature or 1.0,
    top_k=int(settings.get('top_k') or 0),
    top_p=float(settings.get('top_p') or 1.0),
  )


def _whole(name: str, value: Any) -> int:
  try:
    return int(value)
  except ValueError as e:
    raise ValueError(
      f'{name}={value}; a whole number is needed, as in {name}=8.'
    ) from e


def _bar(total: int, disable: bool) -> tqdm.tqdm:
  return tqdm.tqdm(total=total, disable=disable or jax.process_index() != 0)
