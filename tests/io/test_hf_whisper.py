"""Tests of jaxq.io.hf_whisper: layout, configuration and what is refused."""

import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

from jaxq.io import hf_whisper
from jaxq.nn import taps
from tests.io import whisper_files


class HfWhisperTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def open(self, **arguments):
    return hf_whisper.HfWhisperSource(
      whisper_files.write_hf(self.folder, **arguments)
    )

  def test_every_value_arrives_once_and_transposed(self):
    made = whisper_files.tensors()
    source = self.open(made=made)
    outside = dict(taps.leaves(source.outside()))
    trees = [outside] + [dict(taps.leaves(source.block(i))) for i in range(5)]
    total = sum(leaf.size for tree in trees for leaf in tree.values())
    self.assertEqual(total, sum(a.size for a in made.values()))
    np.testing.assert_array_equal(
      outside['conv1/kernel'][2, 5], made['model.encoder.conv1.weight'][:, 5, 2]
    )
    np.testing.assert_array_equal(
      trees[3]['cross/o_proj/kernel'],
      made['model.decoder.layers.0.encoder_attn.out_proj.weight'].T,
    )
    self.assertNotIn('cross/o_proj/kernel', trees[2])
    self.assertNotIn('attention/k_proj/bias', trees[1])

  def test_suppressed_tokens_of_generation_config_win(self):
    whisper_files.write_hf(self.folder)
    path = self.folder / 'generation_config.json'
    path.write_text(json.dumps({'suppress_tokens': [9], 'max_length': 448}))
    config = hf_whisper.HfWhisperSource(self.folder).config
    self.assertEqual(config['suppress_tokens'], [9])
    self.assertEqual(config['begin_suppress_tokens'], [whisper_files.END])

  def test_head_that_repeats_the_embedding(self):
    made = whisper_files.tensors()
    made['proj_out.weight'] = made['model.decoder.embed_tokens.weight'].copy()
    self.assertNotIn('head', self.open(made=made).outside())

  def test_shards(self):
    made = whisper_files.tensors()
    whisper_files.write_hf(self.folder, made=made)
    want = dict(taps.leaves(hf_whisper.HfWhisperSource(self.folder).block(4)))
    (self.folder / 'model.safetensors').unlink()
    names = sorted(made)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
      file = f'model-{i}.safetensors'
      safetensors.numpy.save_file(
        {name: made[name] for name in part}, self.folder / file
      )
      weight_map |= dict.fromkeys(part, file)
    index = self.folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': weight_map}))
    got = dict(taps.leaves(hf_whisper.HfWhisperSource(self.folder).block(4)))
    for path, leaf in want.items():
      np.testing.assert_array_equal(got[path], leaf)

  @parameterized.parameters(
    ({'activation_function': 'relu'}, "activation_function='relu' changes"),
    ({'scale_embedding': True}, 'scale_embedding=True changes'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config='),
  )
  def test_other_maths(self, changes, message):
    with self.assertRaisesRegex(NotImplementedError, message):
      self.open(**changes)

  @parameterized.parameters(
    ({'rope_theta': 1.0}, r"keys \['rope_theta'\] are not known .*Remove them"),
    ({'encoder_layers': 0}, 'encoder_layers=0; it must be a positive'),
    ({'decoder_attention_heads': 3}, 'decoder_attention_heads=3; heads must'),
    ({'d_model': 64}, r'has shape .*the configuration asks for'),
    ({'decoder_layers': 4}, r'tensors are missing, first .*layers\.3'),
    ({'decoder_layers': 2}, r'are not expected in a Whisper .*layers\.2'),
  )
  def test_bad_config(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      self.open(**changes)

  def test_nan(self):
    made = whisper_files.tensors()
    made['model.encoder.layers.1.fc2.bias'][3] = np.nan
    source = self.open(made=made)
    with self.assertRaisesRegex(ValueError, 'fc2.bias: 1 of 32 values are NaN'):
      source.block(1)

  def test_integers(self):
    made = whisper_files.tensors()
    made['model.encoder.layers.1.fc2.bias'] = np.ones(32, np.int8)
    with self.assertRaisesRegex(NotImplementedError, 'fc2.bias has dtype I8'):
      self.open(made=made)

  def test_missing_files(self):
    with self.assertRaisesRegex(FileNotFoundError, 'config.json: no such file'):
      hf_whisper.HfWhisperSource(self.folder)
    whisper_files.write_hf(self.folder)
    (self.folder / 'model.safetensors').unlink()
    with self.assertRaisesRegex(FileNotFoundError, 'weights must be safeten'):
      hf_whisper.HfWhisperSource(self.folder)

  def test_damaged_files(self):
    whisper_files.write_hf(self.folder)
    path = self.folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:1000])
    with self.assertRaisesRegex(ValueError, 'truncated or damaged'):
      hf_whisper.HfWhisperSource(self.folder)
    for text, message in (('[]', 'holds a list'), ('{', 'is not JSON')):
      (self.folder / 'config.json').write_text(text)
      with self.assertRaisesRegex(ValueError, message):
        hf_whisper.HfWhisperSource(self.folder)


if __name__ == '__main__':
  absltest.main()
