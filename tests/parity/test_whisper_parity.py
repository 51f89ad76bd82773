"""Random small Whispers and features, here and in transformers.

Saved by transformers, loaded by models.load: logits and greedy tokens agree,
with the languages, the suppressed tokens and the caches that generation uses.
"""

import os
import tempfile

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import models
from experiments import transcription
from jaxq.data import audio
from jaxq.decode import autoregressive
from tests.io import whisper_files
from tests.parity import oracle

V = whisper_files.VOCAB
FRAMES = 40


def setUpModule():
  oracle.require()


def random_whisper(seed, **sizes):
  """A Whisper with random float32 weights, no two norms alike."""
  import torch
  import transformers

  torch.manual_seed(seed)
  config = transformers.WhisperConfig(
    attn_implementation='eager',
    vocab_size=V,
    num_mel_bins=8,
    max_source_positions=FRAMES // 2,
    max_target_positions=64,
    decoder_start_token_id=whisper_files.START,
    bos_token_id=whisper_files.END,
    eos_token_id=whisper_files.END,
    pad_token_id=whisper_files.END,
    suppress_tokens=[3, 5],
    begin_suppress_tokens=[whisper_files.END],
    **sizes,
  )
  model = transformers.WhisperForConditionalGeneration(config)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name and name.endswith('weight'):
        parameter.uniform_(0.5, 1.5)
      elif 'embed' in name:
        parameter.normal_(0.0, 1.0)
      elif name.endswith('bias'):
        parameter.normal_(0.0, 0.1)
      else:
        parameter.normal_(0.0, parameter[0].numel() ** -0.5)
  return model.eval()


def logits(model, features, tokens):
  """features (B, F, mels), tokens (B, T) -> logits (B, T, V)."""
  import torch

  with torch.no_grad():
    out = model(
      input_features=torch.from_numpy(features).mT.contiguous(),
      decoder_input_ids=torch.from_numpy(np.asarray(tokens, np.int64)),
    )
  return out.logits.numpy()


def greedy(model, features, prompt, count):
  """The argmax after each prefix, suppressed tokens left out."""
  ids = list(prompt)
  for i in range(count):
    row = logits(model, features, [ids])[0, -1]
    row[[3, 5, *([whisper_files.END] if i == 0 else [])]] = -np.inf
    ids.append(int(row.argmax()))
    if ids[-1] == whisper_files.END:
      break
  return ids[len(prompt) :]


class WhisperParityTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(
      d_model=32,
      encoder_layers=2,
      encoder_attention_heads=4,
      encoder_ffn_dim=64,
      decoder_layers=3,
      decoder_attention_heads=2,
      decoder_ffn_dim=48,
    ),
    dict(
      d_model=48,
      encoder_layers=1,
      encoder_attention_heads=1,
      encoder_ffn_dim=40,
      decoder_layers=1,
      decoder_attention_heads=6,
      decoder_ffn_dim=96,
    ),
  )
  def test_logits_and_greedy_tokens(self, **sizes):
    reference = random_whisper(sizes['d_model'], **sizes)
    folder = self.enter_context(tempfile.TemporaryDirectory())
    reference.save_pretrained(folder)
    whisper_files.tokenizer().save(os.path.join(folder, 'tokenizer.json'))
    model = models.load(folder)
    self.assertEqual(model.family, 'whisper')
    self.assertEqual(model.config.suppress_tokens, (3, 5))

    rng = np.random.default_rng(0)
    features = rng.normal(0, 1, (2, FRAMES, 8)).astype(np.float32)
    tokens = rng.integers(0, V, (2, 21))
    got, _ = model.module.apply(
      model.variables, features, jnp.asarray(tokens, jnp.int32)
    )
    expected = logits(reference, features, tokens)
    self.assertLess(oracle.relative_error(np.asarray(got), expected), 1e-3)

    prompt = [whisper_files.START, 30, 40, 50]
    encoded = model.module.apply(model.variables, features, method='encode')
    cross = model.module.apply(model.variables, encoded, method='cross_caches')
    out = autoregressive.generate(
      transcription.speech_model(model.module),
      {**model.variables, 'cross': cross},
      [prompt, prompt],
      max_new_tokens=16,
    )
    for row, length, one in zip(out.tokens, out.lengths, features, strict=True):
      expected = greedy(reference, one[None], prompt, 16)
      self.assertEqual(row[:length].tolist(), expected)


class FeatureParityTest(parameterized.TestCase):
  @parameterized.parameters(80, 128)
  def test_log_mel(self, mels):
    import transformers

    extractor = transformers.WhisperFeatureExtractor(feature_size=mels)
    rng = np.random.default_rng(0)
    time = np.arange(5 * audio.RATE) / audio.RATE
    clip = np.sin(2 * np.pi * (200 + 100 * time) * time) * np.exp(-time)
    clip = (0.3 * clip + rng.normal(0, 0.003, time.size)).astype(np.float32)
    want = extractor(clip, sampling_rate=audio.RATE, return_tensors='np')
    got = np.asarray(audio.log_mel(audio.windows(clip), mels))[0].T
    self.assertEqual(got.shape, (mels, audio.FRAMES))
    np.testing.assert_allclose(got, want['input_features'][0], atol=1e-4)

  def test_filters(self):
    from transformers import audio_utils

    want = audio_utils.mel_filter_bank(
      num_frequency_bins=201,
      num_mel_filters=80,
      min_frequency=0.0,
      max_frequency=8000.0,
      sampling_rate=16000,
      norm='slaney',
      mel_scale='slaney',
    )
    np.testing.assert_allclose(audio.mel_filters(80), want, atol=1e-9)


if __name__ == '__main__':
  absltest.main()
