"""Tests of experiments.train, experiments.training and what reads a model."""

import dataclasses
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
  mosaic_dialogue,
  mosaic_evaluation,
  reporting,
  token_pictures,
  token_reduction,
  training,
  training_files,
)
from jaxq.data import digits as digits_lib
from jaxq.data import mosaic
from jaxq.kvcache import paged
from jaxq.parallel import mesh as mesh_lib
from jaxq.tokens import interface, prumerge, registry
from tests.data import mosaic_testing
from tests.experiments import mosaic_models, testing

DATA, MODEL = mosaic_models.DATA, mosaic_models.MODEL
JOB = training.Job(
  data=DATA,
  model=MODEL,
  train=training.TrainConfig(
    vision_steps=8,
    steps=12,
    vision_batch=4,
    batch=4,
    warmup=2,
    save_every=50,
    log_every=4,
  ),
)
CACHE = paged.PagedConfig()
FLAGS = (
  '--data=video:frames=2,rows=2,columns=2,min_digits=1,questions_per_sample=4',
  '--model=small:vision_size=16,vision_layers=1,vision_heads=2,hidden_size=16,'
  'num_layers=2,num_heads=2',
  '--train=adamw:vision_steps=8,steps=12,vision_batch=4,batch=4,warmup=2,'
  'save_every=50,log_every=4',
)


def metrics(folder):
  lines = (folder / 'metrics.jsonl').read_text('utf-8').splitlines()
  read = [json.loads(line) for line in lines]
  return [(m['phase'], m['step'], m['loss']) for m in read]


class TrainTest(parameterized.TestCase):
  """One training, in setUpClass, that the tests look at."""

  root: pathlib.Path
  folder: pathlib.Path
  outcome: testing.Outcome

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
    cls.folder = training.folder_of(JOB)
    cls.outcome = testing.call(*FLAGS, '--eval_videos=3', name='train')

  def call(self, *args, name):
    return testing.call(*args, name=name)

  def test_20_steps(self):
    self.assertEqual(self.outcome.code, 0, self.outcome.err)
    self.assertIn(f'the model is in {self.folder}', self.outcome.err)
    self.assertIn('accuracy', self.outcome.out)
    self.assertIn('below 90%', self.outcome.err)
    steps = [(phase, step) for phase, step, _ in metrics(self.folder)]
    self.assertEqual(
      steps,
      [
        ('vision', 4),
        ('vision', 8),
        ('answers', 4),
        ('answers', 8),
        ('answers', 12),
      ],
    )
    trained = training.load(self.folder, 'video')
    self.assertEqual(trained.model, MODEL)
    self.assertEqual(trained.data, DATA)
    self.assertFalse((self.folder / 'state').exists())

  def test_a_run_that_was_stopped_ends_with_the_same_bits(self):
    folder = self.root / 'stopped'
    for stop, complete in ((6, False), (9, False), (None, True)):
      self.assertEqual(training.train(JOB, folder, stop_after=stop), complete)
    jax.tree.map(
      np.testing.assert_array_equal,
      training.load(folder).params,
      training.load(self.folder).params,
    )
    self.assertEqual(
      [m for m in metrics(folder) if m in metrics(self.folder)],
      metrics(self.folder),
    )

  def test_trained_parts(self):
    params = training.load(self.folder).params
    train = dataclasses.replace(JOB.train, freeze_vision=True)
    frozen = dataclasses.replace(JOB, train=train)
    for job, phase, names in (
      (JOB, 'vision', {'probe', 'tower'}),
      (JOB, 'answers', set(params)),
      (frozen, 'answers', set(params) - {'probe', 'tower'}),
    ):
      trainer = training._Trainer(job, phase, params, None)
      self.assertEqual(set(trainer._split(params)[0]), names)

  def test_on_a_mesh(self):
    mesh = mesh_lib.make_mesh('data:1,model:1', jax.devices()[:1])
    found = []
    for name, where in (('one', None), ('mesh', mesh)):
      training.train(JOB, self.root / name, mesh=where, stop_after=3)
      saved = training_files.restore(self.root / name, training.PHASES)
      assert saved is not None
      found.append(saved['params'])
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *found
    )

  def test_what_differs_has_another_name(self):
    faster = dataclasses.replace(JOB.train, learning_rate=0.1)
    other = dataclasses.replace(JOB, train=faster)
    self.assertNotEqual(other.content_hash, JOB.content_hash)
    saving = dataclasses.replace(JOB.train, save_every=7)
    self.assertEqual(
      dataclasses.replace(JOB, train=saving).content_hash, JOB.content_hash
    )
    with self.assertRaisesRegex(ValueError, 'differs in train.learning_rate'):
      training.train(other, self.folder)

  def test_reducers_compose_with_caches(self):
    trained = training.load(self.folder)
    texts = ['uniform:budget=0.5', 'fastv:budget=0.5']
    rows = token_reduction.compare(trained, texts, 3)
    self.assertEqual([row.name for row in rows], ['all tokens', *texts])
    self.assertEqual(
      [row['tokens'].value for row in rows], [MODEL.num_visual, 4, 4]
    )
    self.assertEqual(rows[0]['FLOPs'].value, 1.0)
    self.assertLess(rows[1]['FLOPs'].value, rows[2]['FLOPs'].value)
    full = mosaic_evaluation.full_accuracy(trained, 3)
    self.assertEqual(full['accuracy'].value, rows[0]['accuracy'].value)
    cached = token_reduction.compare(trained, texts[:1], 3, kv_cache=CACHE)
    for with_cache, without in zip(cached, rows[:2], strict=True):
      self.assertEqual(with_cache['accuracy'].value, without['accuracy'].value)
    with self.assertRaisesRegex(NotImplementedError, 'caches of two lengths'):
      token_reduction.compare(trained, texts[1:], 3, kv_cache=CACHE)

  def test_a_class_token_is_given_and_taken_away(self):
    trained = training.load(self.folder)
    (encoded,) = token_reduction.encode(trained, 2)
    config = prumerge.PruMergeConfig(budget=0.5, neighbours=1, adaptive=False)
    method = token_reduction.Method(config=config)
    reduced = jax.jit(
      lambda params, visual: token_reduction.reduce(
        MODEL, method, params, visual, None, jax.random.key(0)
      )
    )(trained.params, encoded.visual)
    self.assertEqual(reduced.assignment.shape, (2, MODEL.num_visual))
    used = np.asarray(reduced.mask)
    self.assertTrue((used[:, :-1] >= used[:, 1:]).all())  # Not in use: last.
    self.assertTrue((np.asarray(reduced.count) <= 4).all())

  def test_evidence_recall_by_hand(self):
    reduced = interface.Reduced(
      tokens=jnp.zeros((1, 2, 1)),
      mask=jnp.ones((1, 2), bool),
      positions=jnp.zeros((1, 2, 1), jnp.int32),
      size=jnp.array([[1.0, 5.0]]),
      index=jnp.array([[0, 1]]),
      assignment=jnp.array([[0, 1, -1, 1]]),
      count=jnp.array([2]),
    )
    for evidence, recall in (
      ([1, 0, 0, 0], 1.0),
      ([1, 1, 0, 0], 0.5),  # Slot 1 is too large.
      ([0, 0, 1, 0], 0.0),
      ([0, 0, 0, 0], 1.0),
    ):
      got = token_reduction.evidence_recall(
        reduced, jnp.array([evidence], bool)
      )
      self.assertEqual(float(got[0]), recall)

  def test_flops_by_hand(self):
    d, m, n = 16, 2 * 16 * 2 // 3, 8 + 4
    full = 4 * n * d * d + 2 * n * n * d + 3 * n * d * m
    n = 2 + 4
    less = 4 * n * d * d + 2 * n * n * d + 3 * n * d * m
    got = token_reduction.flops(MODEL, 2, layer=1)
    self.assertAlmostEqual(got, (full + less) / (2 * full))

  def test_evaluate_and_generate(self):
    output = self.root / 'run' / 'results.json'
    output.parent.mkdir()
    outcome = self.call(
      f'--model={self.folder}',
      '--token_reducer=uniform:budget=0.5',
      '--videos=3',
      f'--output={output}',
      name='evaluate',
    )
    self.assertEqual(outcome.code, 0, outcome.err)
    self.assertIn('evidence recall', outcome.out)
    (picture,) = (output.parent / 'tokens').glob('*.svg')
    drawn = picture.read_text('utf-8')
    self.assertIn('data-kept="4"', drawn)
    self.assertIn(drawn.strip(), token_pictures.section(output.parent))
    page = reporting.write(output.parent).read_text('utf-8')
    self.assertIn(drawn.strip(), page)
    self.assertIn('visual tokens by uniform:budget=0.5', page)
    self.assertIn('With 4 visual tokens', page)
    outcome = self.call(
      f'--model={self.folder}',
      '--prompt=presence d3',
      '--token_reducer=uniform:budget=0.5',
      '--max_new_tokens=2',
      name='generate',
    )
    self.assertEqual(outcome.code, 0, outcome.err)
    self.assertContainsSubset(outcome.out.split(), mosaic.VOCABULARY)

  @parameterized.parameters(
    (('--token_reducer=tome:r=x',), 'whole number is needed'),
    (('--token_reducer=cacovid',), 'parameters that are trained'),
    (('--token_reducer=tomato',), "'tomato' is no token reducer; allowed"),
  )
  def test_bad_reducers_are_one_sentence(self, args, message):
    outcome = self.call(
      f'--model={self.folder}', '--videos=1', *args, name='evaluate'
    )
    self.assertEqual(outcome.code, 1)
    self.assertLen(outcome.errors, 1)
    self.assertRegex(outcome.errors[0], message)

  @parameterized.parameters(
    (('--data=film',), "'film' is no data; allowed"),
    (('--model=small:patch_size=3',), 'patch_size=3; a cell has 8 pixels'),
    (('--train=adamw:batch=0',), 'batch=0; it must be at least 1'),
    (('--train=adamw:vision_steps=0,steps=0',), 'nothing to train'),
  )
  def test_bad_flags_are_one_sentence(self, args, message):
    outcome = self.call(*FLAGS, *args, name='train')
    self.assertEqual(outcome.code, 1)
    self.assertLen(outcome.errors, 1)
    self.assertRegex(outcome.errors[0], message)

  def test_messages(self):
    with self.assertRaisesRegex(
      ValueError, "the variant 'video'; 'audio' was asked for"
    ):
      training.load(self.folder, 'audio')
    with self.assertRaisesRegex(FileNotFoundError, 'holds no trained MosaicQA'):
      training.load(self.root / 'nowhere')
    with self.assertRaisesRegex(ValueError, r"\['yeti'\] are no words"):
      mosaic_dialogue.say(
        training.load(self.folder), None, 'presence yeti', 0, 1
      )
    with self.assertRaisesRegex(ValueError, "scores='best'; allowed are"):
      token_reduction.Method(config=registry.REDUCERS['tome'], scores='best')


if __name__ == '__main__':
  absltest.main()
