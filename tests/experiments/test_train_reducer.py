"""Tests of experiments.train_reducer and experiments.reducer_training."""

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from experiments import (
  token_reduction,
  trained_reducers,
  training,
  training_files,
)
from experiments.reducer_training import (
  cacovid,
  embedlens,
  job,
  program,
  registry,
  through_decoder,
)
from jaxq.data import digits as digits_lib
from jaxq.data import mosaic
from jaxq.tokens import embedlens as embedlens_lib
from jaxq.tokens import interface, tokenflex, tokenflex_training
from models import visual_tokens
from tests.data import mosaic_testing
from tests.experiments import mosaic_models, testing

DATA, MODEL = mosaic_models.DATA, mosaic_models.MODEL
MODEL_JOB = training.Job(data=DATA, model=MODEL, train=training.TrainConfig())
SCHEDULE = program.Schedule(
  steps=4, batch=2, questions=2, save_every=50, log_every=2
)
CACOVID = (
  'rate=0.25,rate_min=0.25,rate_max=0.5,frame_ratio=0.5,visits=2,tokens=3,'
  'frames=2,learning_rate=0.01,layer_rate=0.01'
)
# Reducer, fields of its training.
CASES = {
  'qtsplus': ('qtsplus:budget_hidden=8', 'rate=0.01'),
  'cacovid': ('cacovid:budget=0.5', CACOVID),
  'tokenflex': ('tokenflex:counts=1/4', 'decoder_rate=0'),
  'embedlens': ('embedlens:top_k=1', ''),
  'vqtoken': ('vqtoken:ffn=8,iters=4', 'budgets=0.5'),
  'random': ('random:budget=0.5', ''),
}


def _q_proj(block):
  return block['attention']['q_proj']['kernel']


# Name: method and the model's parameters -> a learned array, what it began as.
CHANGED = {
  'qtsplus': lambda method, params: (
    _q_proj(method.params['scoring_0']),
    _q_proj(params['blocks_1']),
  ),
  'cacovid': lambda method, params: (
    _q_proj(method.params['block']),
    _q_proj(params['blocks_0']),
  ),
  'vqtoken': lambda method, _: (method.params['mlp']['down_proj']['kernel'], 0),
  'random': lambda method, params: (
    method.model['head']['kernel'],
    params['head']['kernel'],
  ),
}


def write_model(folder, seed=0):
  """A folder of experiments.train, of an untrained model."""
  train = training.TrainConfig(seed=seed)
  wanted = dataclasses.replace(MODEL_JOB, train=train)
  training_files.claim(folder, wanted.description)
  training_files.finish(folder, jax.device_get(training._init(wanted)))


def figures(folder):
  lines = (folder / 'metrics.jsonl').read_text('utf-8').splitlines()
  return [json.loads(line)['figures'] for line in lines]


class TrainReducerTest(parameterized.TestCase):
  """One model, in setUpClass, on which all trainings are."""

  root: pathlib.Path
  trained: training.Trained
  encoded: token_reduction.Encoded

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(
      mock.patch.object(digits_lib, 'load', mosaic_testing.digits)
    )
    temporary = tempfile.TemporaryDirectory()
    cls.root = pathlib.Path(cls.enterClassContext(temporary))
    cls.enterClassContext(
      mock.patch.dict(os.environ, {'JAXQ_CACHE': str(cls.root / 'cache')})
    )
    write_model(cls.root / 'model')
    cls.trained = training.load(cls.root / 'model')
    (cls.encoded,) = token_reduction.encode(cls.trained, 2)

  def job(self, text, train='', **schedule):
    wanted = dataclasses.replace(SCHEDULE, **schedule)
    return job.job(text, self.trained, wanted, train)

  def setting(self, text, train=''):
    return self.job(text, train).setting

  @parameterized.parameters(*CASES)
  def test_it_learns_and_is_found_again(self, name):
    wanted, folder = self.job(*CASES[name]), self.root / name
    self.assertTrue(job.train(wanted, folder))
    self.assertTrue(job.train(wanted, folder), 'there is nothing left to do')
    self.assertLen(figures(folder), 2)
    self.assertTrue(np.isfinite(list(figures(folder)[-1].values())).all())
    method = token_reduction.parse(f'{folder}:budget=0.5', self.trained)
    self.assertEqual(method.config.budget, 0.5)
    if name in CHANGED:
      after, before = CHANGED[name](method, self.trained.params)
      self.assertTrue(np.any(after != before))
    self.assertEqual(bool(method.model), name in ('vqtoken', 'random'))
    said, recall, count = jax.eval_shape(
      functools.partial(token_reduction.answers, MODEL, method, None),
      self.trained.params,
      self.encoded.visual,
      self.encoded.text,
      self.encoded.evidence,
      jax.random.key(0),
    )
    self.assertEqual({x.shape for x in (said, recall, count)}, {(2, 8)})

  def test_a_run_that_was_stopped_ends_with_the_same_bits(self):
    wanted = self.job(*CASES['random'])
    folders = [self.root / 'random', self.root / 'stopped']
    self.assertTrue(job.train(wanted, folders[0]))
    self.assertFalse(job.train(wanted, folders[1], stop_after=3))
    self.assertTrue(job.train(wanted, folders[1]))
    learned = [
      jax.tree.leaves(trained_reducers.load(str(folder), self.trained).model)
      for folder in folders
    ]
    jax.tree.map(np.testing.assert_array_equal, *learned)
    self.assertEqual(figures(folders[0])[0], figures(folders[1])[0])

  def test_the_loss_falls(self):
    train = 'rate=0.01,decoder_rate=0.01'
    wanted = self.job('tokenflex:counts=4', train, steps=40, log_every=5)
    job.train(wanted, self.root / 'falls')
    losses = [line['loss'] for line in figures(self.root / 'falls')]
    self.assertLess(losses[-1], losses[0] - 0.5)

  def test_the_losses_on_the_share_lower_it(self):
    train = 'rate=0.01,known=false,lambda_t=0,lambda_m=20'
    wanted = self.job('qtsplus:budget_hidden=8', train, steps=12)
    job.train(wanted, self.root / 'share')
    rho = [line['rho'] for line in figures(self.root / 'share')]
    self.assertLess(rho[-1], rho[0] - 0.02)

  def test_the_reward_is_the_chance_of_the_right_answer(self):
    batch = job._videos(self.job(*CASES['cacovid']))[0]
    visual = program.viewer(self.trained)({'frames': batch['frames'][None]})
    text, targets = batch['text'][0], batch['targets'][0]
    keep = jnp.array([[1, 0, 0, 1, 0, 0, 0, 0]], bool)
    got = cacovid._rewards(
      MODEL, 1.0, 4, self.trained.params, keep, visual.tokens, text, targets
    )
    kept = interface.token_set(
      visual.tokens.tokens[:, [0, 3]],
      positions=visual.tokens.positions[:, [0, 3]],
    )
    logits = visual_tokens.answer(
      MODEL, self.trained.params, kept, text[None, None]
    )
    at = int(np.argmax(targets != mosaic.IGNORE))
    expected = jax.nn.softmax(logits[0, 0, at])[targets[at]]
    np.testing.assert_allclose(got, [expected], rtol=1e-5)
    # Of the most likely answer alone: certain, or impossible.
    certain = cacovid._rewards(
      MODEL, 1e-6, 4, self.trained.params, keep, visual.tokens, text, targets
    )
    self.assertIn(float(certain[0]), (0.0, 1.0))

  def test_counts_are_drawn_as_the_library_draws_them(self):
    config = tokenflex.TokenFlexConfig(counts=(1, 4), probs=(0.25, 0.75))
    made, shares = through_decoder.by_counts(
      config, through_decoder.DecoderTrainConfig(), MODEL
    )
    for step in range(20):
      count = tokenflex_training.sample_count(3, step, config)
      drawn = made[through_decoder.draw(3, step, shares)]
      self.assertEqual(drawn.budget * 4, count)

  def test_words_that_are_never_said_attract_no_token(self):
    setting = self.setting(*CASES['embedlens'])
    unsaid = embedlens.unsaid_words(DATA, MODEL.vocab_size)
    self.assertIn(mosaic.TOKENS['caption'], unsaid)
    self.assertNotIn(mosaic.TOKENS['presence'], unsaid)
    run = embedlens.build(setting)
    state = run.init()
    state['ids'][:] = 3  # Everything is like one word.
    for name in embedlens._FIELDS[1:]:
      state[name][:] = 1.0
    probe = run.finish(state).reducer
    self.assertEqual(probe.classes[3], embedlens_lib.DEAD)
    self.assertTrue((np.asarray(probe.bias)[unsaid] == -np.inf).all())
    state['nearest'][:], state['chance'][:] = 0.2, 0.3
    with self.assertLogs(level='WARNING') as logs:
      run.finish(state)
    self.assertIn('cosine of 0.200, those of random vectors', logs.output[0])

  def test_from_the_command_line(self):
    model = f'--model={self.root / "model"}'
    outcome = testing.call(
      model,
      f'--token_reducer={CASES["random"][0]}',
      '--steps=4',
      '--batch=2',
      '--questions=2',
      '--log_every=2',
      '--eval_videos=2',
      name='train_reducer',
    )
    self.assertEqual(outcome.code, 0, outcome.err)
    (folder,) = (self.root / 'cache' / 'reducers').iterdir()
    self.assertEqual(folder, job.folder_of(self.job(*CASES['random'])))
    self.assertIn(f'the reducer is in {folder}', outcome.err)
    self.assertIn('uniform:budget=0.5', outcome.out)
    self.assertTrue((folder / 'results.json').is_file())
    self.assertTrue((folder / 'resolved.flags').is_file())
    reducer = f'--token_reducer={folder}:budgets=0.5'
    outcome = testing.call(model, reducer, '--videos=2', name='evaluate')
    self.assertEqual(outcome.code, 1)
    self.assertRegex(outcome.errors[0], "cannot read 'budgets=0.5'; .* fields")

  @parameterized.parameters(
    (('--token_reducer=fastv',), "'fastv' has no training on MosaicQA; allow"),
    (('--token_reducer=tokenflex:counts=9',), 'at most 4. Give squares'),
    (('--token_reducer=qtsplus', '--train=rte=1'), "cannot read 'rte=1'"),
    (
      ('--token_reducer=qtsplus:mixing_layers=3',),
      'blocks of the model, which',
    ),
    (('--token_reducer=cacovid:scorer=given',), 'has nothing to train'),
    (('--token_reducer=cacovid', '--train=rate=0.01'), 'rounds to 0'),
    (
      ('--token_reducer=tokenflex:counts=4', '--train=budgets=0.5'),
      'it draws from its counts',
    ),
    (
      ('--token_reducer=uniform', '--train=decoder_rate=0'),
      'nothing is left to train. Give a decoder_rate',
    ),
  )
  def test_bad_flags_are_one_sentence(self, args, message):
    outcome = testing.call(
      f'--model={self.root / "model"}',
      '--steps=1',
      f'--output={self.root / "bad"}',
      *args,
      name='train_reducer',
    )
    self.assertEqual(outcome.code, 1)
    self.assertLen(outcome.errors, 1)
    self.assertRegex(outcome.errors[0], message)

  def test_messages(self):
    wanted = self.job(*CASES['random'], steps=1)
    folder = self.root / 'messages'
    job.train(wanted, folder)
    other = self.root / 'other'
    write_model(other, seed=1)
    with self.assertRaisesRegex(ValueError, 'a reducer serves one. Train it'):
      token_reduction.parse(str(folder), training.load(other))
    with self.assertRaisesRegex(ValueError, 'differs in schedule.seed'):
      job.train(self.job(*CASES['random'], steps=1, seed=5), folder)
    with self.assertRaisesRegex(FileNotFoundError, 'no trained reducer'):
      token_reduction.parse(str(self.root / 'model'), self.trained)
    with self.assertRaisesRegex(ValueError, 'steps=0; it must be at least 1'):
      program.Schedule(steps=0)
    with self.assertRaisesRegex(ValueError, 'rates must not be negative'):
      through_decoder.DecoderTrainConfig(rate=-1.0)
    with self.assertRaisesRegex(ValueError, 'budgets=1.5; a share'):
      through_decoder.DecoderTrainConfig(budgets=(1.5,))
    progress = job.Progress(
      phase='reducer', step=3, figures={'loss': np.nan}, seconds=1.0
    )
    with self.assertRaisesRegex(ValueError, 'the loss is nan at step 3'):
      job._check_finite(progress)
    outcome = testing.call('--token_reducer=uniform', name='train_reducer')
    self.assertRegex(outcome.errors[0], '--model not given; .* Train one')

  def test_every_training_has_a_reducer(self):
    for name in registry.TRAININGS:
      self.assertEqual(registry.parse(name)[0], name)


if __name__ == '__main__':
  absltest.main()
