"""Tests of jaxq.io.manifest."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.io import manifest

_MANIFEST = {
  'format': 'jaxq',
  'version': 1,
  'fingerprint': {'data': 'd'},
  'model': {'family': 'decoder', 'config': {}},
  'quantization': {'scheme': 'W4A16'},
  'num_blocks': 0,
  'files': {},
}


class ManifestTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.directory = pathlib.Path(
      self.enterContext(tempfile.TemporaryDirectory())
    )

  def write(self, **changes):
    manifest.write_json(self.directory / 'manifest.json', _MANIFEST | changes)

  def test_json_by_hand(self):
    path = self.directory / 'a.json'
    manifest.write_json(path, {'b': [1], 'a': 'x'})
    self.assertEqual(path.read_bytes(), b'{\n "a": "x",\n "b": [\n  1\n ]\n}\n')
    self.assertEqual(manifest.read_json(path), {'a': 'x', 'b': [1]})

  def test_reads_what_was_written(self):
    self.write()
    self.assertEqual(manifest.read_manifest(self.directory), _MANIFEST)

  def test_migrates_step_by_step(self):
    """Each step sees the previous one's result, and the version grows."""
    self.write(version=1, old='x')
    steps = {
      1: lambda m: {k: v for k, v in m.items() if k != 'old'} | {'new': 'x1'},
      2: lambda m: m | {'new': m['new'] + '2'},
    }
    with (
      mock.patch.object(manifest, 'VERSION', 3),
      mock.patch.object(manifest, 'MIGRATIONS', steps),
    ):
      found = manifest.read_manifest(self.directory)
    self.assertEqual(found, _MANIFEST | {'version': 3, 'new': 'x12'})

  def test_every_older_version_has_a_migration(self):
    self.assertEqual(
      sorted(manifest.MIGRATIONS), list(range(1, manifest.VERSION))
    )

  def test_a_failed_write_leaves_the_old_file(self):
    path = self.directory / 'a.json'
    manifest.write_json(path, 1)
    with mock.patch('os.fsync', side_effect=OSError('fails')):
      with self.assertRaisesRegex(OSError, 'fails'):
        manifest.write_json(path, 2)
    self.assertEqual(manifest.read_json(path), 1)
    self.assertEqual([p.name for p in self.directory.iterdir()], ['a.json'])

  def test_remove_temporary_leaves_the_rest(self):
    (self.directory / '.tmp-a').mkdir()
    (self.directory / '.tmp-a' / 'x').touch()
    (self.directory / '.tmp-b').touch()
    (self.directory / 'c').touch()
    manifest.remove_temporary(self.directory)
    self.assertEqual([p.name for p in self.directory.iterdir()], ['c'])

  def test_records_by_hand(self):
    (self.directory / 'a').mkdir()
    (self.directory / 'a' / 'b').write_bytes(b'abc')
    sha256 = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
    records = manifest.file_records(self.directory)
    self.assertEqual(records, {'a/b': {'sha256': sha256, 'size': 3}})
    manifest.check_files(self.directory, records, contents=True)

  @parameterized.parameters(
    (None, False, 'a is missing; copy or make it again'),
    (b'ab', False, 'a is damaged: it has 2 bytes and should have 3'),
    (b'abd', True, 'a is damaged: its SHA-256 is not the recorded one'),
  )
  def test_changed_file(self, data, contents, message):
    path = self.directory / 'a'
    path.write_bytes(b'abc')
    records = manifest.file_records(self.directory)
    path.unlink()
    if data is not None:
      path.write_bytes(data)
    with self.assertRaisesRegex(ValueError, message):
      manifest.check_files(self.directory, records, contents=contents)

  @parameterized.parameters(
    ({'version': 2}, 'version=2, and this jaxq reads 1..1.*Upgrade jaxq'),
    ({'version': 'x'}, "version='x'; allowed 1..1.*damaged"),
    ({'version': 0}, 'version=0; allowed 1..1.*damaged'),
    ({'format': 'other'}, "not a jaxq manifest: 'format' must be 'jaxq'"),
  )
  def test_refuses_a_manifest(self, changes, message):
    self.write(**changes)
    with self.assertRaisesRegex(ValueError, message):
      manifest.read_manifest(self.directory)

  def test_refuses_a_manifest_without_files(self):
    without = {k: v for k, v in _MANIFEST.items() if k != 'files'}
    manifest.write_json(self.directory / 'manifest.json', without)
    with self.assertRaisesRegex(ValueError, r"damaged: \['files'\] missing"):
      manifest.read_manifest(self.directory)

  def test_refuses_a_truncated_manifest(self):
    text = json.dumps(_MANIFEST)
    (self.directory / 'manifest.json').write_text(text[: len(text) // 2])
    with self.assertRaisesRegex(ValueError, 'manifest.json is damaged: not J'):
      manifest.read_manifest(self.directory)

  def test_refuses_another_directory(self):
    with self.assertRaisesRegex(ValueError, 'not a finished jaxq directory'):
      manifest.read_manifest(self.directory)
    with self.assertRaisesRegex(FileNotFoundError, 'no such directory; give'):
      manifest.read_manifest(self.directory / 'absent')

  def test_differences_by_hand(self):
    there = {'data': 'x', 'code': '1', 'seed': '0'}
    here = {'data': 'x', 'code': '2', 'jax': '0.10'}
    self.assertEqual(
      manifest.differences(there, here),
      "code ('1' there, '2' now), jax (absent there, '0.10' now), "
      "seed ('0' there, absent now)",
    )
    self.assertEqual(manifest.differences(here, dict(here)), '')

  def test_long_values_are_cut_around_the_difference(self):
    common = 'a' * 500
    text = manifest.differences(
      {'flags': common + '--bits=4' + common},
      {'flags': common + '--bits=3' + common},
    )
    self.assertLess(len(text), 150)
    self.assertRegex(text, r'a--bits=4a.* there, .*a--bits=3a.* now')

  @parameterized.parameters(
    ({'a': 1},), ({'a': {'b': 'c'}},), ({1: 'a'},), ('a',)
  )
  def test_fingerprint_must_be_flat(self, fingerprint):
    with self.assertRaisesRegex(TypeError, 'must be a flat dict of strings'):
      manifest.check_fingerprint(fingerprint)


if __name__ == '__main__':
  absltest.main()
