"""Documents from files and folders, and what is wrong with them."""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.data import text, wiki


class ReadTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, name, data):
    path = self.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)

  def test_text_file_is_one_document(self):
    path = self.write('a.txt', 'été\n\nb\n')
    self.assertEqual(list(text.read(path)), ['été\n\nb\n'])

  def test_jsonl_is_a_document_a_line(self):
    rows = [{'text': 'a\nb', 'id': 1}, {'text': ' '}, {'text': 'c'}]
    path = self.write('a.jsonl', '\n\n'.join(json.dumps(r) for r in rows))
    self.assertEqual(list(text.read(path)), ['a\nb', 'c'])

  def test_folder_in_the_order_of_names(self):
    self.write('b.txt', 'B')
    self.write('a.jsonl', '{"text": "A"}')
    self.write('c/d.txt', 'D')
    self.write('skip.md', 'no')
    self.assertEqual(list(text.read(str(self.folder))), ['A', 'B', 'D'])

  def test_wiki_sample_has_titles(self):
    articles = [('Title', 'Text.')]
    with mock.patch.object(wiki, 'wiki_articles', return_value=articles) as w:
      documents = list(text.read('wiki-sample:evaluation'))
    w.assert_called_once_with('evaluation')
    self.assertEqual(documents, ['Title\n\nText.'])

  @parameterized.parameters('wiki-sample', 'wiki-sample:test')
  def test_wiki_sample_needs_a_known_split(self, source):
    with self.assertRaisesRegex(ValueError, "allowed are .'calibration'"):
      list(text.read(source))

  @parameterized.parameters(
    ('a.txt', b' \n', 'a.txt: holds no text'),
    ('a.jsonl', b'\n', 'a.jsonl: holds no text'),
    ('a.txt', b'ab\xff', r'a.txt: is not UTF-8 \(byte 2\)'),
    ('a.csv', b'x', r"ends in '.csv'; allowed are \['.jsonl', '.txt'\]"),
    ('a.jsonl', b'{"text": "a"}\n{"text"', 'a.jsonl, line 2: is not JSON'),
    ('a.jsonl', b'{"txt": "a"}', r"line 1: has no string field .*\['txt'\]"),
    ('a.jsonl', b'{"text": 3}', 'line 1: has no string field "text"'),
    ('a.jsonl', b'[1]', r'line 1: has no string field.*found list'),
    ('a.jsonl', b'{"text": "\xff"}', 'line 1: is not UTF-8'),
  )
  def test_bad_files(self, name, data, message):
    path = self.write(name, data)
    with self.assertRaisesRegex(ValueError, message):
      list(text.read(path))

  def test_missing_file_and_empty_folder(self):
    with self.assertRaisesRegex(
      FileNotFoundError, 'no.txt: no such file.*wiki-sample:SPLIT'
    ):
      list(text.read(str(self.folder / 'no.txt')))
    with self.assertRaisesRegex(ValueError, 'holds no .jsonl or .txt file'):
      list(text.read(str(self.folder)))


if __name__ == '__main__':
  absltest.main()
