"""VQToken's codebook and map: by hand, under permutations, its messages."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from jaxq.tokens import interface, vqtoken

reduce = jax.jit(lambda config, ts: config.reduce(ts), static_argnums=0)
CODES = vqtoken.VQTokenConfig(codes=2, wiring='none')


def blob_video(number, T=4, H=4, W=4, D=16, seed=0):
  """Tokens of `number` kinds in random places, and the kinds."""
  rng = np.random.default_rng(seed)
  kinds = np.linalg.qr(rng.normal(size=(D, D)))[0][:number]
  label = rng.integers(0, number, T * H * W)
  label[:number] = np.arange(number)
  x = 3 * kinds[label] + 0.02 * rng.normal(size=(T * H * W, D))
  ts = interface.token_set(jnp.asarray(x, jnp.float32)[None], grid=(T, H, W))
  return ts, label


class CodebookTest(parameterized.TestCase):
  def test_by_hand(self):
    x = jnp.array([[[1.0, 0], [2, 0], [0, 3]]])
    ts = interface.token_set(x, grid=(1, 1, 3))
    raw = reduce(CODES, ts)
    np.testing.assert_allclose(raw.tokens[0], [[1.5, 0.0], [0.0, 3.0]])
    np.testing.assert_array_equal(raw.assignment, [[0, 0, 1]])
    np.testing.assert_array_equal(raw.size, [[2, 1]])
    unit = reduce(dataclasses.replace(CODES, codebook_of='normalized'), ts)
    np.testing.assert_allclose(unit.tokens[0], np.eye(2), rtol=1e-6)
    hashed = vqtoken.token_hash(raw, (1, 1, 3))
    np.testing.assert_array_equal(hashed, [[[[0, 0, 1]]]])

  def test_codes_come_in_order_of_first_occurrence_at_their_centre(self):
    ts, label = blob_video(6)
    config = dataclasses.replace(CODES, codes=6)
    r = reduce(config, ts)
    np.testing.assert_array_equal(r.assignment[0], label)
    self.assertEqual(float(r.size.sum()), 64)
    for k in range(6):
      at = np.asarray(ts.positions[0])[label == k].mean(0)
      np.testing.assert_array_equal(r.positions[0, k], np.floor(at + 0.5))
    first = reduce(dataclasses.replace(config, positions='first'), ts)
    np.testing.assert_array_equal(first.index[0], np.arange(6))
    np.testing.assert_array_equal(first.positions[0], ts.positions[0, :6])

  def test_codes_in_sequence_say_nothing_of_places(self):
    ts, _ = blob_video(6)
    config = dataclasses.replace(CODES, codes=8, positions='sequence')
    r = reduce(config, ts)
    at = np.where(r.mask[0], np.arange(8), 0)
    for axis in range(3):
      np.testing.assert_array_equal(r.positions[0, :, axis], at)
    np.testing.assert_array_equal(r.index, -1)

  def test_a_shuffled_map_has_the_same_codes_elsewhere(self):
    ts, _ = blob_video(6)
    ts = interface.token_set(
      jnp.concatenate([ts.tokens[:, :1], ts.tokens], axis=1),
      grid=(4, 4, 4),
      special=1,
    )
    mask = ts.mask.at[0, 40:50].set(False)
    ts = dataclasses.replace(ts, mask=mask)
    codes = jnp.where(mask, jnp.arange(65)[None] % 6, -1)
    out = vqtoken.shuffled(jax.random.key(0), codes, ts)
    self.assertEqual(int(out[0, 0]), int(codes[0, 0]))
    np.testing.assert_array_equal(out[0, 40:50], -1)
    np.testing.assert_array_equal(np.sort(out[0, 1:]), np.sort(codes[0, 1:]))
    self.assertGreater(int((out != codes).sum()), 20)

  def test_the_control_shuffles_what_the_attention_sees(self):
    ts, label = blob_video(6)
    config = vqtoken.VQTokenConfig(
      codes=6, num_heads=2, ffn=8, control='shuffled'
    )
    params = config.init_params(jax.random.key(0), ts)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    run = jax.jit(lambda rng: config.reduce(ts, params=params, rng=rng))
    # Codes are the same from any start; what is drawn besides is the map.
    one, two = (run(jax.random.key(seed)) for seed in (0, 1))
    for r in (one, two):
      np.testing.assert_array_equal(r.assignment[0], label)
    self.assertGreater(float(jnp.abs(one.tokens - two.tokens).max()), 1e-3)

  def test_permuted_frames_permute_the_map_only(self):
    ts, _ = blob_video(6)
    config = dataclasses.replace(CODES, codes=6)
    order = np.array([2, 0, 3, 1])
    x = ts.tokens.reshape(1, 4, 16, 16)[:, order].reshape(1, 64, 16)
    r, p = reduce(config, ts), reduce(config, ts.replace(tokens=x))
    before = np.asarray(vqtoken.token_hash(r, (4, 4, 4)))[0, order].reshape(-1)
    after = np.asarray(vqtoken.token_hash(p, (4, 4, 4))).reshape(-1)
    name = {a: b for a, b in zip(before, after, strict=True)}
    np.testing.assert_array_equal([name[a] for a in before], after)
    for a, b in name.items():
      np.testing.assert_allclose(r.tokens[0, a], p.tokens[0, b], atol=1e-5)

  @parameterized.parameters('elbow', 'silhouette')
  def test_adaptive_number_of_codes(self, selection):
    config = dataclasses.replace(
      CODES, codes=8, mode='adaptive', k_min=2, selection=selection
    )
    ts, label = blob_video(5)
    r = reduce(config, ts)
    np.testing.assert_array_equal(r.aux['k'], [5])
    np.testing.assert_array_equal(r.assignment[0], label)
    # Fewer tokens than k_min: as many codes as tokens.
    mask = (jnp.arange(64) < 1)[None]
    one = reduce(config, ts.replace(mask=mask))
    np.testing.assert_array_equal(one.count, [1])
    np.testing.assert_array_equal(one.tokens[0, 0], ts.tokens[0, 0])

  def test_each_member_gets_its_share_of_the_gradient(self):
    ts, label = blob_video(4)
    config = dataclasses.replace(CODES, codes=4)

    def total(x):
      return reduce(config, ts.replace(tokens=x)).tokens[0].sum()

    grad = jax.grad(total)(ts.tokens)[0]
    number = np.bincount(label)[label]
    np.testing.assert_allclose(
      grad, np.repeat(1 / number[:, None], 16, axis=1), rtol=1e-5
    )

  def test_budget(self):
    ts, _ = blob_video(4)
    default = vqtoken.VQTokenConfig()
    self.assertEqual(default.budget_for(ts).k_max, 32)
    share = dataclasses.replace(default, codes=0, budget=0.1)
    self.assertEqual(share.budget_for(ts).k_max, 6)


class MessagesTest(parameterized.TestCase):
  def test_messages(self):
    ts, _ = blob_video(4)
    with self.assertRaisesRegex(ValueError, 'k_max=65 codes of N=64 tokens'):
      CODES.reduce(ts, budget=interface.Budget(k_max=65))
    adaptive = dataclasses.replace(CODES, codes=0, mode='adaptive')
    with self.assertRaisesRegex(ValueError, 'k_min=12 is more than k_max=4'):
      adaptive.reduce(ts, budget=interface.Budget(k_max=4))
    with self.assertRaisesRegex(ValueError, 'k_min=12 is more than codes=4'):
      vqtoken.VQTokenConfig(mode='adaptive', codes=4)
    with self.assertRaisesRegex(ValueError, '2 tokens are not finite'):
      CODES.reduce(ts.replace(tokens=ts.tokens.at[0, 3:5].set(jnp.nan)))
    with self.assertLogs(level='WARNING') as logs:
      zero = ts.tokens.at[0, 3].set(0.0)
      vqtoken.check_values(zero, ts.mask)
    self.assertIn('1 tokens are 0', logs.output[0])
    r = reduce(CODES, ts.replace(tokens=zero))
    self.assertTrue(np.isfinite(r.tokens).all())
    for field in (
      'mode',
      'selection',
      'codebook_of',
      'wiring',
      'positions',
      'control',
    ):
      with self.assertRaisesRegex(ValueError, f"{field}='x'; allowed"):
        wrong: Any = {field: 'x'}
        vqtoken.VQTokenConfig(**wrong)
    with self.assertRaisesRegex(ValueError, 'iters=0, codes=32'):
      vqtoken.VQTokenConfig(iters=0)


if __name__ == '__main__':
  absltest.main()
