"""PTQ1.61's two trainings against torch: loss, gradients, AdamW and rates.

The oracles are written from the paper with torch's own functions, as the
authors' code uses them: autograd, cosine_similarity, AdamW with a rate for
alpha and one for r1 and r2; for the preprocessing AdamW behind clip_grad_norm_,
and the schedule of transformers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from jaxq.numerics import spec as spec_lib
from jaxq.quant import ptq161, restorative_lora
from tests.parity import oracle

pytestmark = pytest.mark.loose_promotion

K, H, N, SAMPLES, T = 32, 24, 16, 3, 8
CONFIG = ptq161.PTQ161Config(
  weights=spec_lib.QuantSpec(dtype='binary'),
  epochs=4,
  lr_alpha=2e-3,
  lr_r=5e-3,
)


def setUpModule():
  oracle.require()


def block(kernels, x, gelu):
  """Two linears and what is between them."""
  return gelu(x @ kernels['up']) @ kernels['down']


def torch_optimize(kernels, frozen, streams):
  """What is learned, {path: (alpha, r1, r2)}, and the mean loss per epoch."""
  import torch

  tensor = lambda a: torch.tensor(np.asarray(a))
  gelu = lambda x: torch.nn.functional.gelu(x, approximate='tanh')
  learned, fixed = {}, {}
  for path, part in frozen.items():
    alpha = ptq161.init_binary(kernels[path], part.mask, CONFIG)[1].alpha
    r1, r2 = (torch.ones(n) for n in reversed(kernels[path].shape))
    learned[path] = [p.requires_grad_() for p in (tensor(alpha), r1, r2)]
    fixed[path] = [tensor(leaf) for leaf in part]
  optimizer = torch.optim.AdamW(
    [
      {'params': [p[0] for p in learned.values()], 'lr': CONFIG.lr_alpha},
      {'params': [q for p in learned.values() for q in p[1:]]},
    ],
    lr=CONFIG.lr_r,
    weight_decay=0.0,
  )
  exact = {path: tensor(w) for path, w in kernels.items()}
  losses = []
  for _ in range(CONFIG.epochs):
    total = 0.0
    for s in range(SAMPLES):
      x, floats = (
        tensor(streams[n][s : s + 1]) for n in ('quantized', 'float')
      )
      made = {}
      for path, (alpha, r1, r2) in learned.items():
        mask, positive, mu, salient = fixed[path]
        signs = torch.where(positive, 1.0, -1.0)
        rows = r1 * r2[:, None] * (alpha * signs + mu)
        made[path] = torch.where(mask[:, None], salient, rows)
      y = block(made, x, gelu)
      loss = 0.0
      for target in (block(exact, floats, gelu), block(exact, x, gelu)):
        cosine = torch.nn.functional.cosine_similarity(y, target, dim=-1)
        loss = loss + torch.nn.functional.mse_loss(y, target)
        loss = loss - torch.log(torch.abs(cosine.mean()))
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()
      total += float(loss.detach())
    losses.append(total / SAMPLES)
  return learned, losses


def torch_lora(w, embed, tokens, start, config):
  """A, B (K, r), (r, N) and the loss of each update."""
  import torch
  import transformers

  tensor = lambda a: torch.tensor(np.asarray(a))
  w, embed, text = tensor(w), tensor(embed), tensor(tokens).long()
  terms = [tensor(leaf).requires_grad_() for leaf in (start.a, start.b)]
  optimizer = torch.optim.AdamW(
    terms, lr=config.learning_rate, weight_decay=0.0
  )
  schedule = transformers.get_cosine_schedule_with_warmup(
    optimizer, round(config.warmup * config.updates), config.updates
  )
  losses = []
  for i in range(config.updates):
    optimizer.zero_grad()
    total = 0.0
    for row in range(i * config.accumulate, (i + 1) * config.accumulate):
      line = text[row % len(text)]
      a, b = terms
      logits = embed[line] @ (w + config.alpha / config.rank * a @ b)
      loss = torch.nn.functional.cross_entropy(logits[:-1], line[1:])
      (loss / config.accumulate).backward()
      total += float(loss.detach()) / config.accumulate
    torch.nn.utils.clip_grad_norm_(terms, config.max_norm)
    optimizer.step()
    schedule.step()
    losses.append(total)
  return [term.detach().numpy() for term in terms], losses


class LoraParityTest(absltest.TestCase):
  def test_every_update_is_torch_s(self):
    rng = np.random.default_rng(0)
    w, embed = (
      jnp.asarray(rng.normal(size=shape), jnp.float32)
      for shape in ((K, N), (N, K))
    )
    tokens = rng.integers(0, N, (6, 8)).astype(np.int32)
    config = restorative_lora.LoraConfig(
      rank=4, dropout=0.0, updates=10, learning_rate=0.02, max_norm=0.5
    )
    params = {'up_proj': {'kernel': w}}

    def apply(variables, tokens):
      term = variables['quant']['up_proj']['low_rank']
      x = embed[tokens]
      return x @ w + term(x)

    losses = []
    made = restorative_lora.train(
      apply,
      {'params': params, 'quant': {}},
      tokens,
      config,
      lambda i, loss: losses.append(loss),
    )['up_proj']
    start = restorative_lora.start(params, config)['up_proj']
    expected, wanted = torch_lora(w, embed, tokens, start, config)
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    self.assertLess(losses[-1], 0.9 * losses[0])
    for found, leaf in zip((made.a, made.b), expected, strict=True):
      np.testing.assert_allclose(found, leaf, atol=1e-4)


class PTQ161ParityTest(absltest.TestCase):
  def test_every_step_is_torch_s(self):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    kernels = {'up': normal(K, H) / 5, 'down': normal(H, N) / 5}
    floats = normal(SAMPLES, T, K)
    streams = {
      'quantized': floats + 0.1 * normal(SAMPLES, T, K),
      'float': floats,
    }
    frozen, learned = {}, {}
    for path, w in kernels.items():
      mask = ptq161.structured_mask(jnp.abs(w[:, 0]), CONFIG.salient_ratio)
      frozen[path], learned[path] = ptq161.init_binary(w, mask, CONFIG)
    expected, losses = torch_optimize(kernels, frozen, streams)
    made, ours = ptq161.optimize_block(
      lambda kernels, x: block(kernels, x, jax.nn.gelu),
      kernels,
      frozen,
      learned,
      streams,
      CONFIG,
    )
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    self.assertLess(losses[-1], losses[0])
    for path, parts in expected.items():
      start = learned[path]
      for found, part, first in zip(made[path], parts, start, strict=True):
        part = part.detach().numpy()
        # Twelve steps: Adam divides by gradients, and rounding is in them.
        np.testing.assert_allclose(found, part, atol=2e-5)
        if first.shape != (K,) or path != 'up':
          self.assertGreater(float(np.max(np.abs(part - first))), 1e-3)


if __name__ == '__main__':
  absltest.main()
