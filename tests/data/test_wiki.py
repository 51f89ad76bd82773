"""The cleaning of wiki markup, and the split of the articles."""

import bz2
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest, parameterized

from jaxq.data import packaged, wiki

PAGE = '<page><title>{}</title>{}<revision><text>{}</text></revision></page>'


def dump_of(pages) -> bytes:
  body = ''.join(
    PAGE.format(title, '<redirect title="x" />' if redirect else '', text)
    for title, redirect, text in pages
  )
  head = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">'
  return bz2.compress(f'{head}{body}</mediawiki>'.encode())


class CleanTest(parameterized.TestCase):
  @parameterized.parameters(
    ("'''Bold''' and ''italic''.", 'Bold and italic.'),
    ('A [[link]] and [[a page|its text]].', 'A link and its text.'),
    ('[http://x.org the site], [http://x.org]', 'the site,'),
    (
      'Text.<ref name="a">{{cite web}}</ref> More.<ref name="a" />',
      'Text. More.',
    ),
    ('{{Infobox|a=1}}Text {{citation needed}}.', 'Text.'),
    ('It is {{convert|20|km|mi}} long.', 'It is 20 km long.'),
    ("The word {{lang|fr|''mot''}}.", 'The word mot.'),
    ('A ({{IPAc-en|a}}; from Latin) b ({{x}}) c.', 'A (from Latin) b c.'),
    ('[[File:a.jpg|thumb|A [[cat]].]]Text[[Category:B]][[fr:C]]', 'Text'),
    ('a<!-- hidden -->b &amp; c&nbsp;d', 'ab & c d'),
    ('{|\n! head\n|-\n| cell\n|}\nAfter', 'After'),
    ('one<br />two', 'one\ntwo'),
    ('a <math>x^2</math> b', 'a b'),
    (
      '== Top ==\nText\n\n\n\n=== Sub ===\n* item',
      'Top\n\nText\n\nSub\n\nitem',
    ),
    (
      'Text\n== References ==\nr\n=== Web ===\ns\n== After ==\nEnd',
      'Text\n\nAfter\n\nEnd',
    ),
    ('never closed <ref>x\n| a = 1\nText', 'never closed\n\nText'),
  )
  def test_markup(self, markup, expected):
    self.assertEqual(wiki.clean(markup), expected)


class ArticlesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.dump = pathlib.Path(folder) / 'dump.xml.bz2'
    titles = 'FBDACGEHI'
    pages = [(t, False, f"'''{t}''' text") for t in titles]
    pages.insert(3, ('Aa', True, '#REDIRECT [[A]]'))
    self.dump.write_bytes(dump_of(pages))
    self.enterContext(
      mock.patch.object(packaged, 'fetch', return_value=self.dump)
    )

  def test_split_by_sorted_title_without_redirects(self):
    titles = {s: [t for t, _ in wiki.wiki_articles(s)] for s in wiki.SPLITS}
    self.assertEqual(
      titles, {'calibration': ['A', 'E', 'I'], 'evaluation': ['B', 'F']}
    )
    self.assertEqual(wiki.wiki_articles('evaluation')[0], ('B', 'B text'))

  def test_clean_text_is_cached_and_names_its_licence(self):
    first = wiki.wiki_articles('calibration')
    with mock.patch.object(wiki, 'clean', side_effect=AssertionError):
      self.assertEqual(wiki.wiki_articles('calibration'), first)
    (cached,) = self.dump.parent.glob('calibration-*.jsonl')
    self.assertIn('CC BY-SA', cached.read_text())
    cached.write_text('{')
    self.assertEqual(wiki.wiki_articles('calibration'), first)

  def test_unknown_split(self):
    with self.assertRaisesRegex(
      ValueError, r"split 'test'; allowed are \['calibration', 'evaluation'\]"
    ):
      wiki.wiki_articles('test')


if __name__ == '__main__':
  absltest.main()
