"""OS+'s search of a threshold against torch: the attention of a BERT.

The oracle is written from the paper with torch's own functions: linears with
biases, scaled_dot_product_attention with padding masked, and its quantizers.
The authors' code masks padding in the loss, and so does this.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from jaxq.nn import blocks, taps
from jaxq.numerics import spec as spec_lib
from jaxq.quant import os_plus
from tests.parity import oracle
from tests.quant import test_os_plus_search

pytestmark = pytest.mark.loose_promotion

PATHS = tuple(f'attention/{n}_proj' for n in 'qkv')
STEPS = 60


def setUpModule():
  oracle.require()


def fake_quant(torch, x, low, high, bits, symmetric):
  """x rounded in a range; of `low` and `high` one per row, or one for all."""
  low, high = low.clamp(max=0), high.clamp(min=0)
  if symmetric:
    scale = torch.maximum(-low, high) / (2 ** (bits - 1) - 1)
    scale = scale.clamp(min=1e-9)  # Padding.
    qmin, qmax, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.0
  else:
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
    qmin, qmax, zero = 0, 2**bits - 1, torch.round(-low / scale)
  codes = torch.clamp(torch.round(x / scale) + zero, qmin, qmax)
  return (codes - zero) * scale


def torch_search(x, mask, parts, heads, weights, inputs, bound):
  """Losses, the index of the best threshold, and its s, in float64."""
  torch = oracle.torch()
  x, mask = torch.tensor(np.asarray(x, np.float64)), torch.tensor(mask)
  parts = [[torch.tensor(np.asarray(a, np.float64)) for a in p] for p in parts]
  B, T, C = x.shape

  def attention(x, kernels):
    q, k, v = (
      (x @ w + bias).view(B, T, heads, C // heads).transpose(1, 2)
      for w, (_, bias) in zip(kernels, parts, strict=True)
    )
    y = torch.nn.functional.scaled_dot_product_attention(
      q, k, v, attn_mask=mask[:, None, None, :]
    )
    return y.transpose(1, 2).reshape(B, T, C)[mask]

  real = x[mask]
  low, high = real.amin(0), real.amax(0)
  u = real.abs().max()
  target = attention(x, [w for w, _ in parts])
  losses, scales = [], []
  for i in range(STEPS + 1):
    t = u - i * (u - bound) / STEPS
    s = torch.clamp(torch.maximum(high / t, -low / t), min=1.0)
    rounded = []
    for w, _ in parts:
      rows = (w * s[:, None]).T
      ends = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
      if weights.granularity == 'tensor':
        ends = rows.min(), rows.max()
      how = weights.bits, weights.symmetric
      rounded.append(fake_quant(torch, rows, *ends, *how).T)
    ends = -t, t
    if inputs.granularity == 'token':
      ends = (x / s).amin(-1, keepdim=True), (x / s).amax(-1, keepdim=True)
    how = inputs.bits, inputs.symmetric
    y = attention(fake_quant(torch, x / s, *ends, *how), rounded)
    losses.append(float(((y - target) ** 2).sum(-1).mean()))
    scales.append(s.numpy())
  best = int(np.argmin(losses))
  return np.array(losses), best, scales[best]


class OsPlusParityTest(parameterized.TestCase):
  @parameterized.parameters(
    ('int8', 'tensor', True),
    ('int6', 'tensor', False),
    ('int6', 'token', False),
  )
  def test_losses_threshold_and_scales(self, dtype, granularity, symmetric):
    model, batch = test_os_plus_search.model_and_batch('bert')
    block, params = model.block_at(0), model.block_params(0)
    carry = model.embed(model.outside(), batch)
    float_ = {'params': params, 'quant': {}}
    x = block.tapped(float_, carry)['attention']['q_proj']['in']
    weights = spec_lib.QuantSpec(  # Of the paper's W8A8, and of its others.
      dtype=dtype,
      granularity='tensor' if symmetric else 'channel',
      symmetric=symmetric,
    )
    inputs = spec_lib.QuantSpec(
      dtype=dtype, granularity=granularity, symmetric=symmetric
    )
    config = os_plus.OsPlusConfig(
      weights=weights,
      inputs=inputs,
      shift='never',  # A channel around 30 is what there is to scale.
      n_grid=STEPS,
      n_max=STEPS,
      lower_bound=0.1,
    )
    site = block.sites[0]
    made, losses = os_plus.migrate(block, site, params, x, config)
    parts = [
      (blocks.kernel_of(params, p), taps.get_path(params, f'{p}/bias'))
      for p in PATHS
    ]
    heads = model.config.num_heads
    want, best, s = torch_search(
      x, batch['mask'], parts, heads, weights, inputs, 0.1
    )
    self.assertEqual(int(jnp.argmin(losses)), best)
    self.assertGreater(best, 0)
    self.assertGreater(s.max(), 2)
    got = params['input_norm']['scale'] / made['input_norm']['scale']
    np.testing.assert_allclose(got, s, rtol=1e-5)
    # A value at a tie rounds otherwise in float64: few losses have one.
    error = np.abs(np.asarray(losses) / want - 1)
    self.assertLess(np.median(error), 1e-4)
    self.assertLess(np.max(error), 0.1)


if __name__ == '__main__':
  absltest.main()
