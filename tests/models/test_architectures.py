"""Every decoder architecture as the calibration sees it.

Random blocks with no two norms alike: each site of each kind of block is an
equivalence, taps see what their linears read, rotations hold or are refused and
kinds make runs.
"""

import dataclasses
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

from jaxq.nn import blocks, taps
from jaxq.quant import equivalence, rotate
from models import decoder

BASE = {
  'vocab_size': 40,
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 4,
  'max_position_embeddings': 32,
}
MIXTRAL = {'num_local_experts': 3, 'num_experts_per_tok': 2}
CONFIGS = {
  'llama': {'attention_bias': True, 'mlp_bias': True},
  'mistral': {'sliding_window': 3},
  'qwen2': {},
  'qwen3': {},
  'gemma2': {'sliding_window': 3},
  'gemma3_text': {'sliding_window': 3, 'sliding_window_pattern': 2},
  'phi3': {'partial_rotary_factor': 0.5},
  'opt': {'num_key_value_heads': 4},
  'mixtral': MIXTRAL,
  'qwen3_moe': {
    **MIXTRAL,
    'moe_intermediate_size': 8,
    'mlp_only_layers': [1],
  },
}
NAMES = tuple((name,) for name in CONFIGS)


def config_of(name):
  fields = {**BASE, **CONFIGS[name], 'model_type': name}
  return decoder.DecoderConfig.from_hf(fields)


def random_parts(config, seed=0):
  """Outside params and the params of each block; nothing is one or zero."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = jax.jit(decoder.Decoder(config).init)
  params = init(jax.random.key(seed), tokens)['params']

  def scatter(path, leaf):
    name = path[-1].key
    if name not in ('scale', 'bias'):
      return leaf
    key = jax.random.fold_in(
      jax.random.key(seed), zlib.crc32(str(path).encode())
    )
    noise = jax.random.uniform(key, leaf.shape, minval=0.5, maxval=1.5)
    return noise if name == 'scale' else 0.3 * (noise - 1.0)

  params = jax.tree_util.tree_map_with_path(scatter, params)
  outside = {k: v for k, v in params.items() if not k.startswith('blocks_')}
  parts = []
  for r, length in enumerate(config.kind_runs()):
    for i in range(length):
      parts.append(jax.tree.map(lambda a, i=i: a[i], params[f'blocks_{r}']))
  return outside, parts


def kinds(config):
  """One block index of each kind."""
  found = {}
  for i in range(config.num_layers):
    found.setdefault(config.kind(i), i)
  return found.values()


class SitesTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_every_site_is_an_equivalence(self, name):
    config = config_of(name)
    _, parts = random_parts(config)
    x = jax.random.normal(jax.random.key(1), (2, 7, config.hidden_size))
    for i in kinds(config):
      spec = decoder.block_spec(config, i)
      apply = jax.jit(spec.apply)
      expected = apply({'params': parts[i], 'quant': {}}, x)
      for j, site in enumerate(spec.sites):
        producer = taps.get_path(parts[i], site.producer)
        size = next(iter(producer.values())).shape[-1]
        key = jax.random.key(j)
        s = jnp.exp(jax.random.uniform(key, (size,), minval=-1.0, maxval=1.0))
        params = equivalence.divide_producer(parts[i], site, s)
        got = apply({'params': params, 'quant': {}}, x)
        np.testing.assert_allclose(got, expected, atol=2e-4, err_msg=str(site))

  def test_sites_by_architecture(self):
    producers = lambda name, i=0: [
      site.producer for site in decoder.block_spec(config_of(name), i).sites
    ]
    dense = ['input_norm', 'attention/v_proj', 'post_norm', 'mlp/up_proj']
    for name in ('llama', 'gemma3_text', 'opt'):
      self.assertEqual(producers(name), dense)
    self.assertEqual(producers('qwen3_moe', 1), dense)
    experts = [f'mlp/expert_{e}/up_proj' for e in range(3)]
    self.assertEqual(producers('mixtral'), dense[:3] + experts)
    gelu = dataclasses.replace(config_of('opt'), activation='gelu')
    self.assertLen(decoder.block_spec(gelu).sites, 3)

  @parameterized.parameters(*NAMES)
  def test_linears_and_their_taps(self, name):
    config = config_of(name)
    _, parts = random_parts(config)
    x = jnp.ones((1, 5, config.hidden_size))
    for i in kinds(config):
      spec = decoder.block_spec(config, i)
      tapped = spec.tapped({'params': parts[i], 'quant': {}}, x)
      for linear in spec.linears:
        own = taps.get_path(tapped, f'{linear.path}/in')
        K = blocks.kernel_of(parts[i], linear.path).shape[0]
        self.assertEqual(own.shape[-1], K)
        shared = taps.get_path(tapped, linear.tap)
        np.testing.assert_array_equal(own, shared)
      kernels = [
        path.removesuffix('/kernel')
        for path, _ in taps.leaves(parts[i])
        if path.endswith('kernel') and 'router' not in path
      ]
      self.assertCountEqual(kernels, [linear.path for linear in spec.linears])


class RotateTest(parameterized.TestCase):
  def rotated(self, name, online):
    config = config_of(name)
    transform = rotate.rotate(rotate.RotateConfig(online=online))
    outside, parts = random_parts(config)
    specs = [decoder.block_spec(config, i) for i in range(config.num_layers)]
    done = [
      dict(zip(('params', 'quant'), transform.apply(s, p, {}, {}), strict=True))
      for s, p in zip(specs, parts, strict=True)
    ]
    plain = [{'params': p, 'quant': {}} for p in parts]
    return config, specs, outside, plain, transform.outside(outside), done

  @parameterized.product(
    name=('llama', 'mistral', 'qwen2', 'qwen3', 'phi3', 'mixtral', 'qwen3_moe'),
    online=(True, False),
  )
  def test_rotated_models_compute_the_same(self, name, online):
    config, specs, outside, plain, turned, done = self.rotated(name, online)
    tokens = jax.random.randint(jax.random.key(2), (2, 8), 0, 40)

    def logits(config, outside, parts):
      variables, runs = decoder.stack(outside, parts, specs)
      module = decoder.Decoder(config, runs)
      return jax.jit(module.apply)(variables, tokens)[0]

    untied = dataclasses.replace(config, tie_embeddings=False)
    np.testing.assert_allclose(
      logits(untied, turned, done), logits(config, outside, plain), atol=1e-4
    )

  @parameterized.parameters(
    ('opt', 'LayerNorms, which take off a mean .* Leave rotate out'),
    ('gemma2', 'norms with scales stand between its linears'),
    ('gemma3_text', 'norms with scales stand between its linears'),
  )
  def test_what_cannot_be_rotated_is_refused(self, name, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      self.rotated(name, True)


class RunsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('llama', (3,)),
    ('mistral', (3,)),
    ('gemma2', (1, 1, 1)),
    ('gemma3_text', (1, 1, 1)),
    ('qwen3_moe', (1, 1, 1)),
    ('mixtral', (3,)),
  )
  def test_kinds_make_runs(self, name, runs):
    config = config_of(name)
    outside, parts = random_parts(config)
    specs = [decoder.block_spec(config, i) for i in range(3)]
    parts = [{'params': p, 'quant': {}} for p in parts]
    variables, made = decoder.stack(outside, parts, specs)
    self.assertEqual(made, runs)
    tokens = jnp.arange(16).reshape(2, 8)
    whole, _ = decoder.Decoder(config, made).apply(variables, tokens)
    x = decoder.Decoder(config).apply(
      {'params': outside}, tokens, method='embed_tokens'
    )
    for spec, part in zip(specs, parts, strict=True):
      x = spec.apply(part, x)
    one = decoder.Decoder(config, made).apply(variables, x, method='logits')
    np.testing.assert_allclose(whole, one, atol=1e-4)

  def test_a_run_of_two_kinds_is_refused(self):
    config = config_of('gemma2')
    with self.assertRaisesRegex(ValueError, 'blocks 0..2 are one run but of'):
      decoder.Decoder(config, (3,)).init(
        jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
      )

  @parameterized.parameters(*NAMES)
  def test_cache_equals_the_whole_sequence(self, name):
    config = config_of(name)
    outside, parts = random_parts(config)
    specs = [decoder.block_spec(config, i) for i in range(3)]
    parts = [{'params': p, 'quant': {}} for p in parts]
    variables, runs = decoder.stack(outside, parts, specs)
    apply = jax.jit(decoder.Decoder(config, runs).apply)
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 40)
    expected, _ = apply(variables, tokens)
    caches = decoder.init_caches(config, runs, 2, 12)
    positions = jnp.broadcast_to(jnp.arange(10)[None], (2, 10))
    first, caches = apply(variables, tokens[:, :7], positions[:, :7], caches)
    np.testing.assert_allclose(first, expected[:, :7], atol=1e-4)
    for t in range(7, 10):
      one = slice(t, t + 1)
      step, caches = apply(variables, tokens[:, one], positions[:, one], caches)
      np.testing.assert_allclose(step[:, 0], expected[:, t], atol=1e-4)


class ShardingTest(parameterized.TestCase):
  @parameterized.parameters(*NAMES)
  def test_rules_reach_every_linear(self, name):
    config = config_of(name)
    _, parts = random_parts(config)
    rules = decoder.sharding_rules(config, 2)
    find = lambda path: next(
      (s for pattern, s in rules if re.search(pattern, path)), PartitionSpec()
    )
    for path, _ in taps.leaves(parts[0]):
      spec = tuple(find(f'blocks_0/{path}'))
      last = path.rsplit('/', 2)[-2:]
      if last[0] in ('o_proj', 'down_proj'):
        self.assertEqual(spec, ('model', None) if last[1] == 'kernel' else ())
      elif last[0].endswith('_proj'):
        want = (None, 'model') if last[1] == 'kernel' else ('model',)
        self.assertEqual(spec, want, path)
      else:
        self.assertEqual(spec, (), path)

  def test_experts_that_do_not_divide(self):
    config = dataclasses.replace(config_of('qwen3_moe'), expert_size=9)
    with self.assertRaisesRegex(ValueError, 'model:2: expert_size=9 is not'):
      decoder.sharding_rules(config, 2)


if __name__ == '__main__':
  absltest.main()
