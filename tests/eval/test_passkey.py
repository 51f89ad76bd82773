"""Tests of jaxq.eval.passkey."""

from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from experiments import adapters
from experiments import passkey as table
from jaxq.decode import autoregressive
from jaxq.eval import passkey
from tests.decode import testing


def encode(text):
  return list(text.encode())


def decode(ids):
  return bytes(ids).decode()


class PromptTest(parameterized.TestCase):
  @parameterized.parameters((0.0, 0), (0.5, 5), (1.0, 10))
  def test_the_number_stands_at_its_depth(self, depth, before):
    text = passkey.prompt('12345', depth, 10)
    head, _, tail = text.partition('The pass key is 12345.')
    self.assertEqual(head.count('The grass'), before)
    self.assertEqual(tail.count('The grass'), 10 - before)
    self.assertEndsWith(text, 'The pass key is')

  @parameterized.parameters(300, 301, 1024)
  def test_prompts_are_as_long_as_asked_and_no_longer(self, length):
    ids = passkey._fit(encode, '12345', 0.3, length)
    self.assertLessEqual(len(ids), length)
    filler = len(passkey._FILLER)
    self.assertGreater(len(ids) + filler, length)

  @parameterized.parameters(
    (' 12345. The', '12345'),
    (' a 12345', '12345'),
    ('123456', '123456'),
    (' is hidden', ''),
  )
  def test_an_answer_is_its_first_number(self, text, number):
    self.assertEqual(passkey.first_number(text), number)


class RetrievalTest(parameterized.TestCase):
  def run_with(self, answer):
    """Retrieval with a stand-in for generation."""
    calls = []

    def generate(model, variables, prompts, *, max_new_tokens, capacity):
      del model, variables
      calls.append((len(prompts), max(map(len, prompts)), capacity))
      tokens = np.full((len(prompts), max_new_tokens), autoregressive.PAD)
      for row, prompt in zip(tokens, prompts, strict=True):
        made = encode(answer(decode(prompt)))[:max_new_tokens]
        row[: len(made)] = made
      lengths = (tokens != autoregressive.PAD).sum(axis=1)
      return autoregressive.Generated(tokens=tokens, lengths=lengths)

    config = passkey.PasskeyConfig(
      lengths=(300, 400), depths=(0.0, 1.0), trials=3
    )
    with mock.patch.object(autoregressive, 'generate', generate):
      out = passkey.retrieval(None, None, encode, decode, config)
    return out, calls

  def test_found_where_the_answer_is_right(self):
    def first_only(text):
      """Knows the number only where it stands in the first half."""
      at = text.index('The pass key is ') + len('The pass key is ')
      return f' {text[at : at + 5]}.' if at < 150 else ' 00000'

    out, calls = self.run_with(first_only)
    self.assertEqual(out.found.shape, (2, 2, 3))
    self.assertTrue(out.found[:, 0].all())
    self.assertFalse(out.found[:, 1].any())
    for rows, longest, capacity in calls:
      self.assertEqual(rows, 4)  # One shape: the last batch is filled up.
      self.assertLessEqual(longest, capacity - 8)

  def test_a_random_model_finds_nothing(self):
    model = testing.model()
    config = passkey.PasskeyConfig(
      lengths=(248,), depths=(0.5,), trials=2, batch_size=2
    )
    out = passkey.retrieval(
      adapters.language_model(model.module),
      model.variables,
      encode,
      lambda ids: model.tokenizer.decode(ids),
      config,
    )
    self.assertFalse(out.found.any())

  @parameterized.parameters(
    (dict(lengths=()), r'lengths=\(\); at least one'),
    (dict(depths=()), r'depths=\(\); at least one'),
    (dict(depths=(1.5,)), 'depth=1.5; it must lie in 0..1'),
    (dict(trials=0), 'trials=0; it must be at least 1'),
    (dict(batch_size=0), 'batch_size=0; it must be at least 1'),
  )
  def test_messages(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      passkey.PasskeyConfig(**fields)

  def test_a_length_without_room(self):
    with self.assertRaisesRegex(ValueError, 'length=50; the question alone'):
      passkey._fit(encode, '12345', 0.5, 50)


class WilsonTest(absltest.TestCase):
  def test_by_hand(self):
    low, high = table.wilson(10, 20)
    np.testing.assert_allclose((low, high), (0.2993, 0.7007), atol=1e-4)
    self.assertAlmostEqual(table.wilson(20, 20)[1], 1.0)
    self.assertAlmostEqual(table.wilson(0, 20)[0], 0.0)
    np.testing.assert_allclose(table.wilson(0, 20)[1], 0.1611, atol=1e-4)


if __name__ == '__main__':
  absltest.main()
