"""Quant Experts: low-rank terms against rounding, some of them by token.

Jia et al., 2026, https://arxiv.org/abs/2602.24059.

  y = x^ @ Q + (x @ A) @ B + sum over the token's experts e of (x @ A_e) @ B_e

Q is W rounded, x^ is x rounded. The shared term makes up for W - Q on all
tokens; an expert for what is then left, on the tokens that a router sends to
it. Tokens are alike whose errors come through the same channels
(token_clusters); experts are fitted to what the router does, not to the
clusters that it was fitted to (expert_terms). Terms and router read x before
its rounding; linears that read one tensor have the same router.

Stored: 16 (r + n r_e) (K + N) / (K N) bits a weight, and routers of n K
numbers. Multiplied per token: (r + top_k r_e) (K + N). r and r_e are
shared_rank and expert_rank, n is num_experts.

What experts can and cannot do: W - Q is one linear map, so a single term of the
whole stored rank, r + n r_e, never leaves more on the calibration data: of a
sum of two Gram matrices, the eigenvalues beyond the first r1 + r2 are at most
those beyond r1 of the one and r2 of the other. Experts come near to it with
r + r_e at work.

With num_experts=0 and gram='diagonal' this is LQER (Zhang et al., 2024, arXiv
2402.02446).

Cost: a pass over the block after AWQ's, a Cholesky factorization per tap and
expert, and an eigenproblem of min(K, N) per linear and expert.

Departures. The paper has no public code; this follows its description. Tokens
are clustered by importances (features='member': by sets of channels). A tap
that saw fewer than 64 tokens for each expert, as in a sparse block, gets the
shared term only. Experts no token goes to are fitted as if channels were alike.
A model of several modalities has 'modality' (B, T) int32 in its carry.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from jaxq.calibrate import observers
from jaxq.nn import blocks, linear, matmul, taps
from jaxq.numerics import qarray, ranges
from jaxq.numerics import spec as spec_lib
from jaxq.quant import (
  awq,
  expert_terms,
  gptq,
  low_rank,
  preconditions,
  transform,
)

Params = Mapping[str, Any]
BASES = ('awq', 'gptq', 'rtn')


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantExpertsConfig:
  """Attributes.

  weights: what kernels become.
  inputs: what inputs become, per token or group, as they come; None: float.
  base: how kernels are rounded: 'awq' scaled and clipped, 'gptq', or 'rtn'.
  search: of ranges, by 'gptq' and 'rtn'.
  shared_rank, expert_rank, num_experts, top_k, router, features, share, tau,
    gram, rows, upweight, dtype, skip_tokens, modalities, seed: as in
    TermsConfig; skip_tokens=0 for encoders, whose first token matters.
  balanced: refuse data without one of the modalities; else there is a warning.
  sample_sequences: calibration sequences that routers and experts are made of.
  refine_epochs, refine_rate, refine_sequences: AdamW on the block's output
    beside the float one's, sequence by sequence; 0 epochs is none.
  """

  weights: spec_lib.QuantSpec
  inputs: spec_lib.QuantSpec | None = None
  base: str = 'awq'
  search: ranges.RangeSearch | None = None
  shared_rank: int = 32
  expert_rank: int = 16
  num_experts: int = 4
  top_k: int = 1
  router: str = 'linear'
  features: str = 'importance'
  share: float = 0.02
  tau: float = 0.5
  gram: str = 'full'
  rows: str = 'all'
  upweight: float = 1.0
  dtype: str = 'bfloat16'
  skip_tokens: int = 1
  modalities: int = 1
  balanced: bool = False
  sample_sequences: int = 16
  refine_epochs: int = 0
  refine_rate: float = 1e-4
  refine_sequences: int = 128
  seed: int = 0

  def __post_init__(self):
    if self.base not in BASES:
      raise ValueError(
        f'QuantExpertsConfig: base={self.base!r}; allowed {list(BASES)}. Use '
        'one of them.'
      )
    for name in ('sample_sequences', 'refine_sequences'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'QuantExpertsConfig: {name}={getattr(self, name)}; allowed 1 or '
          'more. The default is '
          f'{QuantExpertsConfig.__dataclass_fields__[name].default}.'
        )
    dynamic = ('group', 'token')
    if self.inputs is not None and self.inputs.granularity not in dynamic:
      raise ValueError(
        f'QuantExpertsConfig: inputs.granularity={self.inputs.granularity!r}; '
        f'allowed {list(dynamic)}, taken as they come. Choose a scheme such as '
        'W4A8.'
      )
    if self.balanced and self.modalities == 1:
      raise ValueError(
        'QuantExpertsConfig: balanced=True with modalities=1; there is nothing '
        'to balance. Give the number of modalities.'
      )
    _ = self.terms, self.training  # Each checks its own.
    if self.base == 'awq':
      _ = self.scaling

  @property
  def terms(self) -> expert_terms.TermsConfig:
    """Its part on terms."""
    names = [f.name for f in dataclasses.fields(expert_terms.TermsConfig)]
    values = {name: getattr(self, name) for name in names}
    return expert_terms.TermsConfig(**values)

  @property
  def scaling(self) -> awq.AwqConfig:
    """Of base='awq'."""
    return awq.AwqConfig(weights=self.weights, quantize=False)

  @property
  def solver(self) -> gptq.GptqConfig:
    """Of base='gptq'."""
    return gptq.GptqConfig(weights=self.weights, search=self.search)

  @property
  def training(self) -> low_rank.LowRankConfig:
    """Of the refinement."""
    return low_rank.LowRankConfig(
      epochs=self.refine_epochs, learning_rate=self.refine_rate
    )

  @property
  def has_terms(self) -> bool:
    """Whether there are any, or rounding alone."""
    return bool(self.shared_rank or self.num_experts)

  @property
  def needs_sample(self) -> bool:
    """Whether it looks at single tokens."""
    told_apart = self.has_terms and self.terms.needs_channels
    return told_apart or self.base == 'awq'


def quant_experts(config: QuantExpertsConfig) -> transform.Transform:
  """The method: AWQ's scaling, if that is the base, then all else at once."""
  method = transform.Transform(
    name='quant_experts',
    apply=functools.partial(_apply, config),
    observe=functools.partial(_observe, config),
    failure=functools.partial(failure, config=config),
    check=functools.partial(check, config),
    streams=config.modalities > 1 or config.refine_epochs > 0,
  )
  if config.base == 'awq':
    return transform.chain(awq.awq(config.scaling), method)
  return method


def failure(name: str, config: QuantExpertsConfig) -> str:
  """The error message where a term is NaN."""
  least, *_, largest = low_rank.DAMPINGS
  return (
    f'quant_experts: {name} got no terms; its Gram matrix must be positive '
    f'definite with a damping of {least:g} to {largest:g}, and its tokens must '
    f'make num_experts={config.num_experts} clusters. Look for NaN or Inf in '
    'the calibration data and earlier weights, or lower num_experts.'
  )


def check(
  config: QuantExpertsConfig, where: str, stats: transform.Stats
) -> None:
  """Refuses too little data; warns where a modality or an expert has none.

  Args:
    config: the method's.
    where: the block's name.
    stats: finished.

  Raises:
    ValueError: fewer tokens than a Gram matrix has channels, or than experts
      need; no 'modality', an unknown one, or one missing with balanced=True.
  """
  if config.has_terms and config.gram == 'full':
    preconditions.require_tokens(
      where, stats, 'quant_experts', "use gram='diagonal'"
    )
  if config.num_experts:
    _check_sample(config, where, stats)
  if config.modalities > 1:
    _check_modalities(config, where, stats)


def _check_sample(config, where, stats) -> None:
  needed = expert_terms.TOKENS_PER_EXPERT * config.num_experts
  tokens = {}
  for tap, named in stats.items():
    if 'sample' in named:
      x = named['sample'].x
      counted = expert_terms.counted_tokens(x, config.skip_tokens)
      tokens[tap] = int(jnp.sum(counted))
  if tokens and max(tokens.values()) < needed:
    raise ValueError(
      f'quant_experts: num_experts={config.num_experts} for '
      f'{max(tokens.values())} calibration tokens at {where}; each needs '
      f'{expert_terms.TOKENS_PER_EXPERT}. Lower num_experts, or raise '
      'sample_sequences and the number of sequences.'
    )
  for tap, count in tokens.items():
    if count < needed:
      logging.warning(
        'quant_experts: %s/%s saw %d tokens, fewer than the %d that %d experts '
        'need; it gets the shared term only. Calibrate with more text.',
        where,
        tap,
        count,
        needed,
        config.num_experts,
      )


def _check_modalities(config, where, stats) -> None:
  modality = _carried(config, stats)
  unknown = (modality < 0) | (modality >= config.modalities)
  if bool(jnp.any(unknown)):
    raise ValueError(
      f'quant_experts: the calibration data of {where} has modality '
      f'{int(modality[unknown][0])}; allowed 0 to {config.modalities - 1}. '
      'Raise modalities.'
    )
  seen = jnp.zeros(config.modalities, bool).at[modality.reshape(-1)].set(True)
  missing = [i for i in range(config.modalities) if not bool(seen[i])]
  if not missing:
    return
  message = (
    f'quant_experts: no token of the calibration data of {where} is of '
    f'modality {missing[0]}; all of {config.modalities} should be there. Add '
    'such data'
  )
  if config.balanced:
    raise ValueError(f'{message}, or give balanced=False.')
  logging.warning('%s.', message)


def _carried(config, stats) -> jax.Array:
  """The modality (S, T) of all calibration tokens.

  Raises:
    ValueError: the model does not say.
  """
  carry = stats[transform.STREAMS]['quantized']
  if not isinstance(carry, Mapping) or 'modality' not in carry:
    raise ValueError(
      f'quant_experts: modalities={config.modalities} and the model names '
      "none; its carry must have 'modality' (B, T) int32. Use modalities=1."
    )
  modality: jax.Array = carry['modality']
  return modality


def _by_tap(block: blocks.BlockSpec) -> dict[str, list[str]]:
  """{tap: the linears that it sees the input of}."""
  found: dict[str, list[str]] = {}
  for lin in block.linears:
    found.setdefault(lin.tap, []).append(lin.path)
  return found


def _observe(config, block) -> transform.Requests:
  wanted: dict[str, Any] = {}
  if (config.has_terms and config.gram == 'full') or config.base == 'gptq':
    wanted['hessian'] = observers.hessian
  if config.has_terms and config.gram == 'diagonal':
    wanted['mean_abs'] = observers.mean_abs
  if config.needs_sample:
    wanted['sample'] = observers.sample(config.sample_sequences)
  return dict.fromkeys(_by_tap(block), wanted) if wanted else {}


def _apply(config, block, params, quant, stats):
  exact = params
  terms: dict[str, Any] = {}
  before = quant
  for tap, paths in _by_tap(block).items():
    preconditions.require_float(params, paths, 'quant_experts')
    preconditions.require_dynamic_inputs(quant, paths, 'quant_experts')
    kernels = {
      path: blocks.kernel_of(exact, path).astype(jnp.float32) for path in paths
    }
    rounded = _round(config, kernels, stats.get(tap, {}))
    errors = {
      path: w - qarray.dequantize(rounded[path]) for path, w in kernels.items()
    }
    if config.has_terms:
      terms |= _terms(config, errors, stats, tap)
    for path, q in rounded.items():
      params = taps.set_path(params, f'{path}/kernel', q)
  if config.inputs is not None:
    act = linear.ActQuant(None, None, config.inputs)
    for lin in block.linears:
      quant = taps.set_path(quant, f'{lin.path}/input', act)
  if config.refine_epochs and terms:
    target = {'params': exact, 'quant': before}
    made = {'params': params, 'quant': quant}
    streams = stats[transform.STREAMS]
    terms = _refine(config, block, target, made, terms, streams)
  for path, term in terms.items():
    kernel: Any = blocks.kernel_of(params, path)
    leaves = [linear.dense(leaf) for leaf in (term.a, term.b)]
    sound = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))
    scale = jnp.where(sound, kernel.scale, jnp.nan)  # The driver sees a NaN.
    kernel = dataclasses.replace(kernel, scale=scale)
    params = taps.set_path(params, f'{path}/kernel', kernel)
    quant = taps.set_path(quant, f'{path}/low_rank', term)
  return params, quant


def _round(config, kernels, stats) -> dict[str, qarray.QArray]:
  """{path: Q} of the linears of one tap."""
  if config.base == 'gptq':
    feedback = gptq.feedback(stats['hessian'].mean, config.solver)
    return {
      path: gptq.quantize_with(w, feedback, config.solver)
      for path, w in kernels.items()
    }
  if config.base == 'rtn':
    return {
      path: qarray.quantize(w, config.weights, search=config.search)
      for path, w in kernels.items()
    }
  how, x = config.scaling, stats['sample'].x
  x = x.reshape(-1, x.shape[-1])
  x = x[:: -(-x.shape[0] // how.clip_tokens)]  # Evenly spread.
  return {
    path: qarray.quantize(
      w
      if path.rpartition('/')[2] in how.skip_clip
      else awq.clip_kernel(w, x, how),
      config.weights,
    )
    for path, w in kernels.items()
  }


def _terms(config, errors, stats, tap) -> dict[str, Any]:
  """{path: term} of the linears of one tap."""
  found = stats[tap]
  # A Hessian is twice the Gram matrix.
  gram = (
    found['mean_abs'].mean
    if config.gram == 'diagonal'
    else found['hessian'].mean / 2
  )
  x = modality = None
  if config.terms.needs_channels:
    x = found['sample'].x
    modality = jnp.zeros(x.shape[:2], jnp.int32)
    if config.modalities > 1:
      carried = _carried(config, stats)
      if carried.shape[1] != x.shape[1]:
        raise ValueError(
          f'quant_experts: modality of {carried.shape[1]} tokens and '
          f'{x.shape[1]} tokens at {tap}; every token must have one. Use '
          'modalities=1 with this model.'
        )
      carried = carried[: x.shape[0]].astype(jnp.int32)
      modality = modality.at[: carried.shape[0]].set(carried)
  return expert_terms.fit_terms(errors, gram, x, modality, config.terms)


@flax.struct.dataclass
class _Straight:
  """An input quantizer that gradients pass as if it were not there."""

  act: Any

  @property
  def spec(self) -> spec_lib.QuantSpec:
    """Of the quantizer."""
    spec: spec_lib.QuantSpec = self.act.spec
    return spec

  def fake(self, x: jax.Array) -> jax.Array:
    """(T, K) -> (T, K)."""
    return x + lax.stop_gradient(matmul.fake_input(x, self.act) - x)


def _refine(config, block, target, made, terms, streams) -> dict[str, Any]:
  """Terms after training on the block's output; as they were if that is worse.

  Args:
    config, block: as in _apply.
    target: {'params', 'quant'} of the float block, on the float model's stream.
    made: of the rounded block without terms, on the stream that reaches it.
    terms: {path: term}.
    streams: stats[STREAMS].
  """
  head: Any = lambda tree: jax.tree.map(
    lambda a: a[: config.refine_sequences], tree
  )

  def output(variables, carry):
    return blocks.stream(block.apply(variables, carry)).astype(jnp.float32)

  def exact(carry):
    one = jax.tree.map(lambda a: a[None], carry)
    return output({**target, 'quant': _bare(target['quant'])}, one)[0]

  samples = {
    'carry': head(streams['quantized']),
    'y': lax.map(exact, head(streams['float'])),
  }
  params: Any = made['params']
  quant: Any = made['quant']
  for path in terms:
    kernel = qarray.dequantize(blocks.kernel_of(params, path))
    params = taps.set_path(params, f'{path}/kernel', kernel)
    if (act := taps.get_path(quant, f'{path}/input')) is not None:
      quant = taps.set_path(quant, f'{path}/input', _Straight(act))

  def loss(trained, sample):
    marks = quant
    for path, fields in trained.items():
      term = dataclasses.replace(terms[path], **fields)
      marks = taps.set_path(marks, f'{path}/low_rank', term)
    y = output({'params': params, 'quant': marks}, sample['carry'])
    return jnp.mean(jnp.square(y - sample['y']))

  start = {
    path: {
      name: linear.dense(getattr(term, name)).astype(jnp.float32)
      for name in ('a', 'b', 'router')
      if hasattr(term, name)
    }
    for path, term in terms.items()
  }
  trained = low_rank.train(loss, start, samples, config.training)
  made_terms = {}
  for path, fields in trained.items():
    term = terms[path]
    if 'router' in fields:
      router = fields['router'].astype(term.router.dtype)
      term = dataclasses.replace(term, router=router)
    term = dataclasses.replace(term, a=fields['a'], b=fields['b'])
    made_terms[path] = expert_terms.store(term, config.dtype)
  return made_terms


def _bare(quant: Params) -> dict[str, Any]:
  """`quant` less the input quantizers."""
  bare: dict[str, Any] = {}
  for path, leaf in taps.leaves(quant):
    if path.rpartition('/')[2] != 'input':
      bare = taps.set_path(bare, path, leaf)
  return bare
