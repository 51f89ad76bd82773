"""Tests of jaxq.io.checkpoint.

The toy run below has parameters written out by hand, not computed, so that
the stored directory in testdata keeps meaning the same.
"""

import contextlib
import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tokenizers
from absl.testing import absltest, parameterized

from jaxq.io import checkpoint, manifest
from jaxq.nn import linear
from jaxq.numerics import qarray
from jaxq.numerics import spec as spec_lib
from tests.io import test_trees

_FIXTURE = pathlib.Path(__file__).parent / 'testdata' / 'checkpoint_v1'
_FINGERPRINT = {'data': 'abc', 'flags': '--bits=4', 'source': 'toy'}
_NUM_BLOCKS = 2


def toy_outside():
  embedding = np.arange(12).reshape(3, 4).astype(ml_dtypes.bfloat16)
  return {
    'embed': {'embedding': embedding},
    'final_norm': {'scale': np.ones(4, np.float32)},
  }


def toy_block(i):
  kernel = qarray.QArray(
    qvalue=np.arange(8, dtype=np.uint8).reshape(4, 2) + i,  # (8 / 2, 2)
    scale=np.full((2, 2), 0.5, np.float32),
    zero_point=None,
    tensor_scale=None,
    spec=spec_lib.QuantSpec(dtype='int4', granularity='group', group_size=4),
    shape=(8, 2),
  )
  act = linear.ActQuant(
    scale=np.full((1, 1), 0.25, np.float32),
    zero_point=None,
    spec=spec_lib.QuantSpec(dtype='int8', granularity='tensor'),
  )
  hadamard = linear.OnlineHadamard(size=8)
  return {
    'params': {
      'input_norm': {'scale': np.full(8, i + 1, np.float32)},
      'mlp': {'down_proj': {'kernel': kernel}},
    },
    'quant': {'mlp': {'down_proj': {'hadamard': hadamard, 'input': act}}},
  }


def toy_tokenizer():
  model = tokenizers.models.WordLevel({'a': 0, 'b': 1}, unk_token='a')
  return tokenizers.Tokenizer(model).to_str()


def toy_extra(num_blocks):
  return {
    'model': {
      'family': 'decoder',
      'config': {'model_type': 'llama', 'num_hidden_layers': num_blocks},
    },
    'quantization': {'scheme': 'W4A8', 'method': 'rtn'},
  }


def run(directory, num_blocks=_NUM_BLOCKS, fingerprint=None):
  """Starts or resumes the toy run and ends it."""
  fingerprint = _FINGERPRINT if fingerprint is None else fingerprint
  with checkpoint.Writer(directory, fingerprint) as writer:
    if writer.complete:
      return
    if not writer.has_outside():
      writer.save_outside(toy_outside())
    for i in range(num_blocks):
      if not writer.has_block(i):
        writer.save_block(i, toy_block(i))
    writer.finish(toy_extra(num_blocks), toy_tokenizer())


def contents(directory):
  """{path: bytes, or None for a directory}: all that makes two trees equal."""
  return {
    path.relative_to(directory).as_posix(): (
      path.read_bytes() if path.is_file() else None
    )
    for path in pathlib.Path(directory).rglob('*')
  }


class _Killed(BaseException):
  """Ends a run like a kill: no later change takes effect."""


@contextlib.contextmanager
def _killed_before(n, directory):
  """Ends the body before its n-th change of a name in `directory`."""
  count = 0

  def change(original):
    def wrapped(path, *args, **kwargs):
      nonlocal count
      if not pathlib.Path(path).is_relative_to(directory):
        return original(path, *args, **kwargs)
      count += 1
      if count == n + 1:
        raise _Killed
      return None if count > n else original(path, *args, **kwargs)

    return wrapped

  with (
    mock.patch('os.rename', change(os.rename)),
    mock.patch('os.replace', change(os.replace)),
    mock.patch('os.unlink', change(os.unlink)),
    mock.patch('shutil.rmtree', change(shutil.rmtree)),
    contextlib.suppress(_Killed),
  ):
    yield


class CheckpointTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.output = self.folder / 'out.v1'

  def start(self, fingerprint=None):
    fingerprint = _FINGERPRINT if fingerprint is None else fingerprint
    writer = checkpoint.Writer(self.output, fingerprint)
    self.addCleanup(writer.close)
    return writer

  def assert_toy(self, found, num_blocks):
    self.assertEqual(found.num_blocks, num_blocks)
    test_trees.assert_same(self, found.outside(), toy_outside())
    for i in range(num_blocks):
      test_trees.assert_same(self, found.block(i), toy_block(i))
    self.assertEqual(found.config['model_type'], 'llama')
    self.assertEqual(found.quantization['scheme'], 'W4A8')
    self.assertEqual(found.run_fingerprint, _FINGERPRINT)
    self.assertEqual(found.tokenizer().to_str(), toy_tokenizer())

  def test_reads_what_was_written(self):
    run(self.output)
    found = checkpoint.open_checkpoint(self.output, verify=True)
    self.assert_toy(found, _NUM_BLOCKS)
    self.assertEqual(os.listdir(self.folder), ['out.v1'])  # And no lock.
    self.assertCountEqual(
      os.listdir(self.output),
      ['blocks', 'manifest.json', 'outside', 'tokenizer.json'],
    )

  def test_reads_version_1(self):
    """Made by `run(_FIXTURE, num_blocks=1)`; never make it again."""
    found = checkpoint.open_checkpoint(_FIXTURE, verify=True)
    self.assert_toy(found, 1)
    self.assertLess(
      sum(len(x or b'') for x in contents(_FIXTURE).values()), 5e4
    )
    plain = ocp.PyTreeCheckpointer().restore(_FIXTURE / 'blocks' / '00000')
    np.testing.assert_array_equal(
      plain['params']['mlp']['down_proj']['kernel']['qvalue'],
      np.arange(8).reshape(4, 2),
    )

  def test_equal_runs_write_equal_bytes(self):
    run(self.output)
    run(self.folder / 'again')
    self.assertEqual(contents(self.output), contents(self.folder / 'again'))

  def test_fingerprint_names_the_contents(self):
    names = set()
    for i, fingerprint in enumerate((_FINGERPRINT, _FINGERPRINT, {'a': 'b'})):
      run(self.folder / str(i), fingerprint=fingerprint)
      names.add(checkpoint.open_checkpoint(self.folder / str(i)).fingerprint())
    self.assertLen(names, 2)

  def test_resumes_after_the_last_block(self):
    with self.start() as writer:
      self.assertFalse(writer.has_outside() or writer.has_block(0))
      writer.save_outside(toy_outside())
      writer.save_block(0, toy_block(0))
    with self.start() as writer:
      self.assertTrue(writer.has_outside() and writer.has_block(0))
      self.assertFalse(writer.has_block(1) or writer.complete)
      test_trees.assert_same(self, writer.load_block(0), toy_block(0))
      test_trees.assert_same(self, writer.load_outside(), toy_outside())

  def test_saving_again_replaces(self):
    with self.start() as writer:
      writer.save_block(0, toy_block(1))
      writer.save_block(0, toy_block(0))
      test_trees.assert_same(self, writer.load_block(0), toy_block(0))
    self.assertCountEqual(
      os.listdir(self.output), ['blocks', 'in_progress.json']
    )

  def test_complete_run_again_changes_nothing(self):
    run(self.output)
    before = contents(self.output)
    writer = self.start()
    self.assertTrue(writer.complete)
    test_trees.assert_same(self, writer.load_block(0), toy_block(0))
    with self.assertRaisesRegex(ValueError, 'is complete; nothing more can'):
      writer.save_block(0, toy_block(0))
    self.assertEqual(contents(self.output), before)
    self.assertEqual(os.listdir(self.folder), ['out.v1'])

  def test_killed_before_every_change(self):
    """Stops before the n-th change of a name on the disk, for every n."""
    run(self.folder / 'expected', num_blocks=1)
    expected = contents(self.folder / 'expected')
    for n in range(100):
      shutil.rmtree(self.output, ignore_errors=True)
      with _killed_before(n, self.output):
        run(self.output, num_blocks=1)
        break
      run(self.output, num_blocks=1)
      self.assertEqual(contents(self.output), expected, msg=f'change {n}')
    self.assertBetween(n, 9, 50)

  def test_killed_processes(self):
    """kill -9 at three random moments, in three processes, then a fourth."""
    run(self.folder / 'expected', num_blocks=8)
    code = (
      'import sys\n'
      'from tests.io import test_checkpoint\n'
      'print("ready", flush=True)\n'
      'sys.stdin.readline()\n'
      'test_checkpoint.run(sys.argv[1], num_blocks=8)\n'
    )
    children = [
      subprocess.Popen(
        [sys.executable, '-c', code, str(self.output)],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | {'JAX_PLATFORMS': 'cpu'},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      for _ in range(4)
    ]
    self.addCleanup(lambda: [child.kill() for child in children])
    delays = random.Random(0)
    for i, child in enumerate(children):
      self.assertEqual(child.stdout.readline(), 'ready\n')
      child.stdin.write('\n')
      child.stdin.flush()
      if i < 3:
        time.sleep(delays.uniform(0.02, 0.2))
        child.kill()
      child.communicate()
    self.assertIn(-signal.SIGKILL, [child.returncode for child in children])
    self.assertEqual(children[-1].returncode, 0)
    self.assertEqual(contents(self.output), contents(self.folder / 'expected'))

  def test_interrupt_leaves_what_the_next_start_removes(self):
    with self.start() as writer:
      writer.save_block(0, toy_block(0))
      with (
        mock.patch.object(manifest, 'sync_tree', side_effect=KeyboardInterrupt),
        mock.patch('shutil.rmtree'),
        self.assertRaises(KeyboardInterrupt),
      ):
        writer.save_block(1, toy_block(1))
    self.assertIn('.tmp-blocks-00001', os.listdir(self.output))
    with self.start() as writer:
      self.assertNotIn('.tmp-blocks-00001', os.listdir(self.output))
      self.assertTrue(writer.has_block(0))
      self.assertFalse(writer.has_block(1))

  @parameterized.parameters(
    OSError(errno.ENOSPC, 'No space left on device'),
    OSError(errno.EDQUOT, 'Disk quota exceeded'),
    ValueError('RESOURCE_EXHAUSTED: ... No space left on device [28]'),
  )
  def test_full_disk(self, error):
    writer = self.start()
    writer.save_block(0, toy_block(0))
    before = contents(self.output)
    message = 'the disk is full: blocks/00001 of .* was not saved.* Free some'
    with mock.patch.object(
      ocp.PyTreeCheckpointHandler, 'save', side_effect=error
    ):
      with self.assertRaisesRegex(OSError, message) as caught:
        writer.save_block(1, toy_block(1))
    self.assertIn(caught.exception.errno, (errno.ENOSPC, errno.EDQUOT))
    self.assertStartsWith(str(caught.exception), 'the disk is full')
    self.assertEqual(contents(self.output), before)
    writer.save_block(1, toy_block(1))

  def test_full_disk_at_the_end(self):
    writer = self.start()
    writer.save_outside(toy_outside())
    before = contents(self.output)
    error = OSError(errno.ENOSPC, 'No space left on device')
    with mock.patch('os.fsync', side_effect=error):
      with self.assertRaisesRegex(OSError, 'disk is full: the manifest of'):
        writer.finish(toy_extra(0), toy_tokenizer())
    self.assertEqual(contents(self.output), before)
    writer.finish(toy_extra(0), toy_tokenizer())
    self.assertTrue(checkpoint.is_checkpoint(self.output))

  def test_other_failures_are_passed_on(self):
    writer = self.start()
    with mock.patch.object(manifest, 'sync_tree', side_effect=OSError('bad')):
      with self.assertRaisesRegex(OSError, '^bad$'):
        writer.save_block(0, toy_block(0))
    self.assertEqual(
      sorted(os.listdir(self.output)), ['blocks', 'in_progress.json']
    )

  @parameterized.parameters(True, False)
  def test_another_run_is_refused(self, finished):
    if finished:
      run(self.output)
    else:
      self.start().close()
    before = contents(self.output)
    message = (
      'holds an? (un)?finished run that differs from this one in '
      r"data \('abc' there, 'xyz' now\).*Choose another --output"
    )
    with self.assertRaisesRegex(ValueError, message):
      self.start(_FINGERPRINT | {'data': 'xyz'})
    self.assertEqual(contents(self.output), before)
    self.assertEqual(os.listdir(self.folder), ['out.v1'])

  def test_strange_outputs_are_refused(self):
    self.output.mkdir()
    (self.output / 'thesis.tex').touch()
    with self.assertRaisesRegex(ValueError, r"holds \['thesis.tex'\] and was"):
      self.start()
    self.assertEqual(os.listdir(self.output), ['thesis.tex'])
    (self.output / 'in_progress.json').write_text('[1]')
    with self.assertRaisesRegex(ValueError, 'in_progress.json is not of jaxq'):
      self.start()
    self.output = self.output / 'thesis.tex'
    with self.assertRaisesRegex(ValueError, 'is a file; the output must be'):
      self.start()

  def test_a_bucket_is_no_path(self):
    with self.assertRaisesRegex(
      NotImplementedError, 'gs://b/out: jaxq writes to file systems.*Mount the'
    ):
      checkpoint.Writer('gs://b/out', _FINGERPRINT)

  def test_two_writers(self):
    first = self.start()
    with self.assertRaisesRegex(OSError, 'another run is writing .*out.v1 '):
      self.start()
    first.close()
    self.start().close()
    with self.assertRaisesRegex(ValueError, 'is closed; nothing more can be'):
      first.save_block(0, toy_block(0))

  def test_finish_wants_everything(self):
    writer = self.start()
    with self.assertRaisesRegex(ValueError, 'outside is missing and 2 blocks'):
      writer.finish(toy_extra(2), toy_tokenizer())
    writer.save_outside(toy_outside())
    writer.save_block(1, toy_block(1))
    with self.assertRaisesRegex(ValueError, 'blocks/00000 is missing and 2'):
      writer.finish(toy_extra(2), toy_tokenizer())
    with self.assertRaisesRegex(ValueError, "must hold 'model'"):
      writer.finish({'quantization': {}}, toy_tokenizer())
    with self.assertRaisesRegex(ValueError, 'give num_blocks, the number of'):
      writer.finish(
        {'model': {'config': {}}, 'quantization': {}}, toy_tokenizer()
      )
    with self.assertRaisesRegex(ValueError, r"has \['files'\]; finish sets"):
      writer.finish(toy_extra(2) | {'files': {}}, toy_tokenizer())
    self.assertFalse(writer.complete)

  @parameterized.parameters(
    ('blocks/00001', None, 'blocks/00001/.* is missing'),
    ('tokenizer.json', None, 'tokenizer.json is missing'),
    (
      'blocks/00000/params.input_norm.scale/0',
      3,
      'params.input_norm.scale/0 is damaged: it has 3 bytes',
    ),
    ('manifest.json', 100, 'manifest.json is damaged: not JSON'),
  )
  def test_damage_is_named(self, name, size, message):
    run(self.output)
    path = self.output / name
    if size is not None:
      path.write_bytes(path.read_bytes()[:size])
    elif path.is_dir():
      shutil.rmtree(path)
    else:
      path.unlink()
    with self.assertRaisesRegex(ValueError, message):
      checkpoint.open_checkpoint(self.output)
    with self.assertRaisesRegex(ValueError, message):
      self.start()

  def test_damage_of_contents(self):
    run(self.output)
    path = self.output / 'outside' / 'final_norm.scale' / '0'
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with self.assertRaisesRegex(ValueError, 'final_norm.scale/0 is damaged'):
      checkpoint.open_checkpoint(self.output, verify=True)

  def test_damaged_block_on_resume(self):
    writer = self.start()
    writer.save_block(0, toy_block(0))
    path = self.output / 'blocks/00000/params.input_norm.scale/0'
    path.write_bytes(path.read_bytes()[:3])
    with self.assertRaisesRegex(ValueError, 'scale/0 is damaged: it has 3 by'):
      writer.load_block(0)

  def test_directories_that_cannot_be_opened(self):
    with self.assertRaisesRegex(FileNotFoundError, 'out.v1: no such direct'):
      checkpoint.open_checkpoint(self.output)
    with self.assertRaisesRegex(ValueError, 'not a finished jaxq directory'):
      checkpoint.open_checkpoint(self.folder)
    self.start().close()
    with self.assertRaisesRegex(ValueError, 'is unfinished; run the command'):
      checkpoint.open_checkpoint(self.output)
    self.assertFalse(checkpoint.is_checkpoint(self.output))

  def test_later_version(self):
    run(self.output)
    path = self.output / 'manifest.json'
    later = json.loads(path.read_text()) | {'version': manifest.VERSION + 1}
    path.write_text(json.dumps(later))
    with self.assertRaisesRegex(ValueError, 'by a later jaxq. Upgrade jaxq'):
      checkpoint.open_checkpoint(self.output)

  @parameterized.parameters(-1, 2)
  def test_block_out_of_range(self, i):
    run(self.output)
    with self.assertRaisesRegex(ValueError, f'block {i} of .*allowed 0..1'):
      checkpoint.open_checkpoint(self.output).block(i)


if __name__ == '__main__':
  absltest.main()
