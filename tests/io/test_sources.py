"""What a source string names, and what opens it."""

import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.data import packaged
from jaxq.io import gguf, hf, sources
from tests.io import model_files


class SourcesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def test_each_kind_is_opened_by_its_reader(self):
    file = model_files.write_gguf(self.folder / 'a.gguf')
    folder = model_files.write_hf(self.folder / 'hf')
    self.assertEqual(sources.kind(str(file)), 'gguf')
    self.assertIsInstance(sources.open_source(str(file)), gguf.GgufSource)
    self.assertEqual(sources.kind(str(folder)), 'hf')
    self.assertIsInstance(sources.open_source(str(folder)), hf.HfSource)
    self.assertEqual(sources.kind('smollm2-135m'), 'packaged')
    with mock.patch.object(packaged, 'fetch', return_value=file):
      self.assertIsInstance(
        sources.open_source('smollm2-135m'), gguf.GgufSource
      )

  def test_a_jaxq_directory_is_left_to_the_caller(self):
    (self.folder / 'manifest.json').write_text('{}')
    self.assertEqual(sources.kind(str(self.folder)), 'jaxq')
    with self.assertRaisesRegex(ValueError, 'jaxq directory.*models.load'):
      sources.open_source(str(self.folder))

  def test_packaged_text_is_no_model(self):
    dump = self.folder / 'dump.bz2'
    dump.write_bytes(b'')
    with (
      mock.patch.object(packaged, 'fetch', return_value=dump),
      self.assertRaisesRegex(
        ValueError, r"allowed are \['minilm-l6', 'smollm2-135m'"
      ),
    ):
      sources.open_source('wiki-sample')

  def test_refusals(self):
    with self.assertRaisesRegex(
      FileNotFoundError, "nowhere: no such file.*'smollm2-135m'"
    ):
      sources.open_source('nowhere')
    with self.assertRaisesRegex(ValueError, 'neither config.json'):
      sources.open_source(str(self.folder))
    other = self.folder / 'model.bin'
    other.write_bytes(b'x')
    with self.assertRaisesRegex(ValueError, 'does not end in .gguf'):
      sources.open_source(str(other))


if __name__ == '__main__':
  absltest.main()
