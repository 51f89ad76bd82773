"""The shape of a decoder: one frozen dataclass for every architecture.

`from_hf` makes it from the keys of a config.json, which jaxq.io.hf_config
checks; a field left at its default is Llama's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxq.io import architectures, hf_config
from jaxq.nn import mlp
from jaxq.nn import rope as rope_lib

NORMS = ('layer', 'rms')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockKind:
  """What sets a block apart from others of the model; static.

  sliding: its attention sees the window only.
  sparse: it has experts in place of one MLP.
  """

  sliding: bool = False
  sparse: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """The shape of a decoder.

  vocab_size (V), hidden_size (C), intermediate_size (F), num_layers (L).
  num_heads (H) query heads share num_kv_heads (Hkv) of head_dim (D) channels.
  rope_theta, norm_eps: bases of the rotary frequencies and of the norms.
  tie_embeddings: the head is the embedding table.
  max_position: longest sequence the model was made for.
  bos_token_id, eos_token_ids: as the checkpoint says.

  Norms and MLP:
    norm: of NORMS. out_norms: attention and MLP end with a norm each (Gemma).
    activation: of mlp.ACTIVATIONS. gated: whether the MLP has a gate.
    qkv_bias, o_bias, mlp_bias: which linears have biases.

  Positions:
    learned_positions: a table of max_position rows instead of rotary ones.
    rotary_dim: channels of a head that turn; None all.
    rope_scaling: None for none.
    local_rope_theta: of sliding blocks, which are not scaled; None: as others.

  Attention:
    qk_norm: heads of q and k pass an RMSNorm.
    attention_scale: of the scores; None is 1 / sqrt(D).
    attention_softcap, logit_softcap: None leaves scores and logits as they are.
    window: keys a query of a sliding block sees; sliding: which blocks are, ()
      none.

  Experts:
    num_experts, experts_per_token, expert_size: of sparse blocks.
    normalize_router: whether the chosen experts' weights sum to one.
    sparse: which blocks are, () none.

  embed_scale: times the embedding.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  rope_theta: float = 10000.0
  norm_eps: float = 1e-5
  tie_embeddings: bool = True
  max_position: int = 2048
  bos_token_id: int | None = None
  eos_token_ids: tuple[int, ...] = ()
  norm: str = 'rms'
  out_norms: bool = False
  activation: str = 'silu'
  gated: bool = True
  qkv_bias: bool = False
  o_bias: bool = False
  mlp_bias: bool = False
  learned_positions: bool = False
  rotary_dim: int | None = None
  rope_scaling: rope_lib.Scaling | None = None
  local_rope_theta: float | None = None
  qk_norm: bool = False
  attention_scale: float | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  window: int | None = None
  sliding: tuple[bool, ...] = ()
  num_experts: int = 0
  experts_per_token: int = 0
  expert_size: int = 0
  normalize_router: bool = True
  sparse: tuple[bool, ...] = ()
  embed_scale: float = 1.0

  def __post_init__(self):
    sizes = ['vocab_size', 'hidden_size', 'intermediate_size', 'num_layers']
    sizes += ['num_heads', 'num_kv_heads', 'head_dim']
    if any(self.sparse):
      sizes += ['num_experts', 'experts_per_token', 'expert_size']
    if any(self.sliding):
      sizes.append('window')
    for name in sizes:
      if (getattr(self, name) or 0) < 1:
        raise ValueError(
          f'DecoderConfig: {name}={getattr(self, name)}; it must be at least '
          "1. Check the checkpoint's config."
        )
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f'DecoderConfig: num_heads={self.num_heads}, num_kv_heads='
        f'{self.num_kv_heads}; query heads must be a multiple of key/value '
        "heads. Check the checkpoint's config."
      )
    if (self.rotary_dim or self.head_dim) % 2:
      raise ValueError(
        f'DecoderConfig: head_dim={self.head_dim}, rotary_dim='
        f'{self.rotary_dim}; rotary positions need an even number. Check the '
        "checkpoint's config."
      )
    for name, allowed in (('norm', NORMS), ('activation', mlp.ACTIVATIONS)):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'DecoderConfig: {name}={getattr(self, name)!r}; allowed '
          f'{sorted(allowed)}.'
        )
    for name in ('sliding', 'sparse'):
      if len(getattr(self, name)) not in (0, self.num_layers):
        raise ValueError(
          f'DecoderConfig: {name} has {len(getattr(self, name))} entries for '
          f'num_layers={self.num_layers}; give one per block, or ().'
        )

  def kind(self, i: int) -> BlockKind:
    """The kind of block i."""
    return BlockKind(
      sliding=bool(self.sliding) and self.sliding[i],
      sparse=bool(self.sparse) and self.sparse[i],
    )

  def kind_runs(self) -> tuple[int, ...]:
    """Lengths of the runs of neighbours of one kind, summing to num_layers."""
    kinds = [self.kind(i) for i in range(self.num_layers)]
    runs = [1]
    for before, kind in zip(kinds, kinds[1:], strict=False):
      if kind == before:
        runs[-1] += 1
      else:
        runs.append(1)
    return tuple(runs)

  def rope(self, kind: BlockKind) -> rope_lib.Rope | None:
    """The rotary positions of a kind of block; None: they are learned."""
    if self.learned_positions:
      return None
    if kind.sliding and self.local_rope_theta is not None:
      return rope_lib.Rope(theta=self.local_rope_theta, dim=self.rotary_dim)
    return rope_lib.Rope(
      theta=self.rope_theta, dim=self.rotary_dim, scaling=self.rope_scaling
    )

  @classmethod
  def from_hf(cls, config: Mapping[str, Any]) -> 'DecoderConfig':
    """From the keys of a Hugging Face config.json, or of hf_config.read.

    Raises:
      ValueError, NotImplementedError: as hf_config.read.
    """
    config = hf_config.read(config, 'config')
    kind, L = config['model_type'], config['num_hidden_layers']
    C, D = config['hidden_size'], config['head_dim']
    opt = kind == 'opt'
    eos = config['eos_token_id']
    bias = bool(config.get('attention_bias'))
    scaling = _scaling(config)
    longer = scaling.factor if scaling and scaling.kind == 'dynamic' else 1
    partial = config.get('partial_rotary_factor', 1.0)
    scalar = config.get('query_pre_attn_scalar')
    window = _window(config)
    types = config.get('layer_types') or ['sliding_attention'] * L
    sliding = tuple(t == 'sliding_attention' for t in types)
    sparse = tuple(architectures.is_sparse(config, i) for i in range(L))
    return cls(
      vocab_size=config['vocab_size'],
      hidden_size=C,
      intermediate_size=config['intermediate_size'],
      num_layers=L,
      num_heads=config['num_attention_heads'],
      num_kv_heads=config['num_key_value_heads'],
      head_dim=D,
      rope_theta=config.get('rope_theta', 10000.0),
      norm_eps=float(config['rms_norm_eps']),
      tie_embeddings=bool(config['tie_word_embeddings']),
      max_position=int(config['max_position_embeddings'] * longer),
      bos_token_id=config['bos_token_id'],
      eos_token_ids=(
        () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
      ),
      norm='layer' if opt else 'rms',
      out_norms=kind in ('gemma2', 'gemma3_text'),
      activation=config['hidden_act'],
      gated=not opt,
      qkv_bias=bias or kind == 'qwen2' or bool(config.get('enable_bias')),
      o_bias=bias or bool(config.get('enable_bias')),
      mlp_bias=bool(config.get('mlp_bias') or config.get('enable_bias')),
      learned_positions=opt,
      rotary_dim=None if partial == 1 else int(D * partial),
      rope_scaling=scaling,
      local_rope_theta=config.get('rope_local_base_freq'),
      qk_norm=architectures.has_qk_norm(config),
      attention_scale=None if scalar is None else scalar**-0.5,
      attention_softcap=config.get('attn_logit_softcapping'),
      logit_softcap=config.get('final_logit_softcapping'),
      window=window,
      sliding=sliding if window and any(sliding) else (),
      num_experts=config.get('num_local_experts', 0),
      experts_per_token=config.get('num_experts_per_tok', 0),
      expert_size=config.get('moe_intermediate_size')
      or (config['intermediate_size'] if any(sparse) else 0),
      normalize_router=bool(config.get('norm_topk_prob', True)),
      sparse=sparse if any(sparse) else (),
      embed_scale=C**0.5 if kind in ('gemma2', 'gemma3_text') else 1.0,
    )


def _window(config: Mapping[str, Any]) -> int | None:
  """The window of the blocks that have one."""
  if not config.get('use_sliding_window', True):
    return None
  return config.get('sliding_window')


def _scaling(config: Mapping[str, Any]) -> rope_lib.Scaling | None:
  """rope_scaling of a config that was checked."""
  scaling = config.get('rope_scaling')
  if scaling is None:
    return None
  scaling = {k: v for k, v in scaling.items() if v is not None}
  kind, longest = scaling['rope_type'], config['max_position_embeddings']
  original = scaling.get('original_max_position_embeddings', longest)
  if kind == 'dynamic':  # Its factor multiplies the length of the config.
    original = longest
  factor = float(scaling.get('factor', longest / original))
  return rope_lib.Scaling(
    kind=kind,
    factor=factor,
    original=original,
    low=float(scaling.get('low_freq_factor', 1.0)),
    high=float(scaling.get('high_freq_factor', 4.0)),
    fast=float(scaling.get('beta_fast') or 32.0),
    slow=float(scaling.get('beta_slow') or 1.0),
    truncate=bool(scaling.get('truncate', True)),
    temperature=hf_config.rope_temperature(config),
    short=tuple(map(float, scaling.get('short_factor', ()))),
    long=tuple(map(float, scaling.get('long_factor', ()))),
  )
