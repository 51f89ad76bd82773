"""The report in a headless browser: its figures, its tooltips, its looks.

Skipped where no Chromium is found. What is measured is the page as drawn:
positions of marks against their axes, nothing fetched, no sideways scrolling,
both colour schemes. JAXQ_SCREENSHOTS names a folder to keep screenshots in.
"""

import json
import os
import pathlib
import re
import shutil
import struct

import numpy as np
from absl.testing import absltest, parameterized

from experiments import report_charts, reporting, run_folder
from tests.experiments import browser, test_report


class BrowserTest(test_report.Case):
  """The page as a person meets it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    path = browser.find()
    if path is None:
      raise cls.skipTest(
        cls(),
        'no Chromium found: install one (apt-get install chromium), or name it '
        'in JAXQ_CHROMIUM',
      )
    cls.browser = cls.enterClassContext(browser.Browser(path))

  def test_the_figures_are_those_of_the_files(self):
    page = self.page()
    folder = page.parent
    self.browser.open(page)
    self.assertEqual(self.browser.errors, [])
    lines = (folder / 'blocks.jsonl').read_text().splitlines()
    blocks = [json.loads(line) for line in lines]
    marks = self.browser.ask(MARKS)
    for series, field in (
      ('GPTQ (this run)', 'output_sqnr_db'),
      ('round to nearest', 'rtn_sqnr_db'),
      ('accumulated from the first block', 'stream_sqnr_db'),
    ):
      drawn = {m['column']: m['value'] for m in marks if m['series'] == series}
      for block in blocks:
        # A tenth of a pixel of 200, over 40 dB.
        self.assertAlmostEqual(
          drawn[str(block['index'])], block[field], delta=0.05
        )
    cells = self.browser.ask(
      "[...document.querySelectorAll('.cell')].map(e => [e.dataset.row,"
      ' +e.dataset.column, +e.dataset.value, getComputedStyle(e).fill])'
    )
    self.assertLen(cells, test_report.NUM_BLOCKS * len(test_report.LINEARS))
    for row, column, value, _ in cells:
      names = {n['name']: n['sqnr_db'] for n in blocks[column]['linears']}
      full = next(name for name in names if name.endswith(row))
      self.assertAlmostEqual(value, names[full], places=3)
    colours = {value: colour for _, _, value, colour in cells}
    self.assertNotEqual(colours[min(colours)], colours[max(colours)])
    stored = json.loads((folder / 'results.json').read_text())['rows']
    shown = self.browser.ask(
      "[...document.querySelectorAll('[data-metric]')].map(e =>"
      ' [e.dataset.metric, +e.dataset.value, parseFloat(e.textContent)])'
    )
    want = [m['value'] for row in stored for m in row['metrics']]
    for value in want:
      close = [s for s in shown if s[1] == value]
      self.assertNotEmpty(close, value)
      self.assertAlmostEqual(close[0][2], value, delta=abs(value) * 1e-3)
    text = self.browser.ask('document.body.innerText')
    self.assertIn('--set\tgptq.damping=0.1', text)
    self.assertIn('abc-dirty', text)

  def test_channels_before_and_after_are_drawn(self):
    page = self.page()
    run = run_folder.load(page.parent)
    self.browser.open(page)
    tap = test_report.TAPS[0]
    chart = f'[data-chart="outliers {tap}"]'
    points = self.browser.ask(
      f"[...document.querySelectorAll('{chart} .point')].map(e =>"
      ' [e.dataset.series, +e.dataset.column, +e.dataset.value])'
    )
    self.assertLen(points, 2 * test_report.NUM_BLOCKS)
    for series, block, value in points:
      absmax = run.channels[block][tap][('before', 'after').index(series)]
      want = absmax.max() / np.median(absmax)
      self.assertAlmostEqual(value, want, delta=1e-4 * want)
    last = test_report.NUM_BLOCKS - 1
    heights = self.browser.ask(
      "['before', 'after'].map(side => document.querySelector("
      f'\'[data-chart="profile {last} {tap}"] path.\' + side)'
      ".getAttribute('d').split(/[ML]/).slice(1).map(p => +p.split(' ')[1]))"
    )
    before, after = np.array(heights)  # Downwards.
    self.assertLen(before, 64)
    self.assertEqual(before.argmin(), 5)  # The outlier.
    self.assertGreater(after[5] - before[5], 50)
    found = self.browser.ask("document.querySelector('#outliers').innerText")
    self.assertIn('input of attention.q_proj\t5\t', found)

  def test_sensitivity_is_drawn_to_scale(self):
    folder = test_report.write_run(self.folder / 'out.run')
    layers = [
      {'name': name, 'scheme': '4', 'kl': kl}
      for name, kl in (('a.up', 0.25), ('a.down', 1.0), ('b.up', 0.5))
    ]
    (folder / 'sensitivity.json').write_text(json.dumps({'layers': layers}))
    self.browser.open(reporting.write(folder))
    bars = self.browser.ask(
      "[...document.querySelectorAll('[data-chart=sensitivity] .bar')].map(e =>"
      ' [e.dataset.row, +e.dataset.value, e.getBoundingClientRect().width])'
    )
    self.assertEqual(
      [bar[:2] for bar in bars],
      [['a.down', 1.0], ['b.up', 0.5], ['a.up', 0.25]],
    )
    widths = [width for _, _, width in bars]
    for width, part in zip(widths, (1.0, 0.5, 0.25), strict=True):
      self.assertAlmostEqual(width / widths[0], part, places=2)

  def test_the_pointer_shows_the_numbers(self):
    self.browser.open(self.page())
    x, y = self.browser.ask(
      "(() => { const e = document.querySelectorAll('[data-chart=output-sqnr]"
      " .hit')[2]; e.scrollIntoView({block: 'center'});"
      ' const b = e.getBoundingClientRect();'
      ' return [b.x + b.width / 2, b.y + b.height / 2]; })()'
    )
    self.browser.move(x, y)
    self.browser.move(x + 1, y)
    tip = self.browser.ask("document.getElementById('tip').innerText")
    value = report_charts.number(test_report.block_report(2).output_sqnr_db)
    self.assertIn('block 2', tip)
    self.assertIn(f'GPTQ (this run): {value} dB', tip)

  @parameterized.product(width=(1200, 390), scheme=('light', 'dark'))
  def test_it_fits_and_can_be_read(self, width, scheme):
    page = self.page()
    del self.browser.requests[:]
    self.browser.open(page, width, scheme)
    self.assertEqual(set(self.browser.requests), {page.resolve().as_uri()})
    wide = self.browser.ask('document.documentElement.scrollWidth')
    self.assertLessEqual(wide, width)
    for ink, ground in (
      ('body', 'body'), ('section p', 'section'), ('.warnings li', '.warnings'),
      ('.tile span', '.tile'), ('td small', 'section'),
    ):  # fmt: skip
      colours = [
        self.browser.ask(
          f"getComputedStyle(document.querySelector('{query}')).{kind}"
        )
        for query, kind in ((ink, 'color'), (ground, 'backgroundColor'))
      ]
      self.assertGreater(contrast(*colours), 4.5, (ink, colours))
    small = self.browser.ask(
      "Math.min(...[...document.querySelectorAll('svg text')].map(e =>"
      ' e.getBoundingClientRect().height))'
    )
    self.assertGreater(small, 7)
    dark = luminance(
      self.browser.ask('getComputedStyle(document.body).backgroundColor')
    )
    self.assertEqual(dark < 0.2, scheme == 'dark')
    shot = self.folder / 'page.png'
    self.browser.screenshot(shot)
    width_seen, height = struct.unpack('>II', shot.read_bytes()[16:24])
    self.assertEqual(width_seen, width)
    self.assertGreater(height, 1500)
    kept = os.environ.get('JAXQ_SCREENSHOTS')
    if kept:
      shutil.copy(shot, pathlib.Path(kept) / f'report_{width}_{scheme}.png')


# Values of the points by where they lie between the ticks of their axis.
MARKS = """
[...document.querySelectorAll('[data-chart=output-sqnr] .point')].map(p => {
  const svg = p.closest('svg');
  const t = [...svg.querySelectorAll('.tick.y')].map(
    e => [+e.dataset.tick, e.getBoundingClientRect()]
  ).map(([v, b]) => [v, b.y + b.height / 2]);
  const b = p.getBoundingClientRect(), y = b.y + b.height / 2;
  const lines = [...svg.querySelectorAll('.grid')].map(
    e => e.getBoundingClientRect().y);
  const a = lines[0], z = lines[lines.length - 1];
  const low = t[0][0], high = t[t.length - 1][0];
  return {series: p.dataset.series, column: p.dataset.column,
    value: low + (a - y) / (a - z) * (high - low)};
})
"""


def luminance(colour):
  """Relative luminance of 'rgb(r, g, b)'."""
  parts = [int(x) / 255 for x in re.findall(r'\d+', colour)[:3]]
  linear = [
    x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts
  ]
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
  """WCAG contrast ratio of two colours."""
  high, low = sorted((luminance(a), luminance(b)), reverse=True)
  return (high + 0.05) / (low + 0.05)


if __name__ == '__main__':
  absltest.main()
