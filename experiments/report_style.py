"""What the report looks like, and what shows the numbers under the pointer.

Colours are defined once for light and once for dark. Text wears the text
colours, never a series' colour; a heat map is one hue, strongest where the
noise is. Figures keep a readable width and scroll inside themselves on a
narrow screen; the page itself never scrolls sideways.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f5; --card: #ffffff; --ink: #1d1c1a; --soft: #5d5b56;
  --line: #e4e2dc; --grid: #ecebe6; --warn: #fff6e0; --warn-line: #e0a100;
  --s1: #2a78d6; --s2: #8b8983; --s3: #6a55c9; --s4: #128a5f; --s5: #b97900;
  --s6: #d0568a; --before: #e0622e; --after: #2a78d6;
  --h0: #fbeee6; --h1: #f8dcca; --h2: #f3c1a3; --h3: #eba077; --h4: #dc7c4c;
  --h5: #bd582a; --h6: #8f3b16;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141413; --card: #1e1e1c; --ink: #f1f0ec; --soft: #b3b0a8;
    --line: #35342f; --grid: #2b2a27; --warn: #2e2710; --warn-line: #c98f1b;
    --s1: #5598e7; --s2: #96948c; --s3: #a094f0; --s4: #2fb488; --s5: #d79a2b;
    --s6: #e07fa9; --before: #ee7f4f; --after: #5598e7;
    --h0: #2c2521; --h1: #432f25; --h2: #633d2a; --h3: #874d30; --h4: #ad5f38;
    --h5: #d87a48; --h6: #ffa877;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
    sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem;
  overflow-wrap: anywhere; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: 0 0 .75rem; max-width: 72ch; }
.over { color: var(--soft); font-size: .85rem; margin: 0 0 .25rem; }
.summary { font-size: 1.1rem; }
section p, .note, figcaption { color: var(--soft); font-size: .9rem; }
.note { font-size: .8rem; margin: .5rem 0 0; max-width: none; }
section { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 20px; margin: 16px 0; }
.tiles { display: grid; gap: 12px; margin: 20px 0;
  grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); }
.tile { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 14px; display: flex;
  flex-direction: column; }
.tile span, .tile small { color: var(--soft); font-size: .8rem; }
.tile b { font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.warnings { background: var(--warn); border-left: 4px solid var(--warn-line); }
.warnings ul { margin: 0; padding-left: 1.2rem; }
.warnings li { margin: .2rem 0; font-size: .9rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
figure { margin: 0 0 8px; min-width: 0; }
.panels { display: grid; gap: 8px 20px;
  grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.panels svg { min-width: 420px; }
figcaption { font-weight: 600; margin: 8px 0 2px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; min-width: 680px; height: auto;
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
    sans-serif; }
svg text { fill: var(--soft); }
.tick.y, .row { text-anchor: end; }
.tick.x, .mark { text-anchor: middle; }
svg .row, svg .mark, svg .end { fill: var(--ink); }
svg .mark { font-weight: 600; }
.tick, .row, .end, td, .tile b { font-variant-numeric: tabular-nums; }
.tile b { font-variant-numeric: normal; }
.grid { stroke: var(--grid); } .axis { stroke: var(--line); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { fill: none; stroke-width: 1.25; stroke-linejoin: round; }
.hit { fill: transparent; }
.hit:hover { fill: var(--ink); fill-opacity: .05; }
.cell:hover, .bar:hover { stroke: var(--ink); }
.cell.none { fill: var(--line); } .bar { fill: var(--s1); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .85rem;
  color: var(--soft); margin: .25rem 0 .5rem; align-items: center; }
.legend span { display: inline-flex; align-items: center; gap: 6px; }
.key { width: 18px; height: 3px; border-radius: 2px; display: inline-block; }
.ramp { gap: 2px !important; }
.ramp i { width: 22px; height: 12px; border-radius: 2px; }
table { border-collapse: collapse; font-size: .88rem; width: 100%; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top; white-space: nowrap; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom;
  white-space: normal; min-width: 4.5em; }
#results thead th { min-width: 9em; overflow-wrap: anywhere; }
tbody th { text-align: left; font-weight: 500; }
th:first-child { text-align: left; }
.words thead th { text-align: left; }
table:not(.words) th:first-child { position: sticky; left: 0;
  background: var(--card); }
tr:last-child > * { border-bottom: 0; }
td small { color: var(--soft); display: block; }
.words td { text-align: left; white-space: normal; width: 100%;
  overflow-wrap: anywhere; font-family: ui-monospace, "SF Mono", Menlo,
    Consolas, "DejaVu Sans Mono", monospace; font-size: .8rem; }
details { margin-top: .75rem; } summary { cursor: pointer; font-size: .9rem; }
#tip { position: fixed; z-index: 1; pointer-events: none; max-width: 320px;
  background: var(--ink); color: var(--page); font-size: .8rem;
  padding: 6px 9px; border-radius: 6px; white-space: pre-line;
  font-variant-numeric: tabular-nums; }
@media (max-width: 560px) {
  main { padding: 20px 12px 40px; } section { padding: 14px; }
  h1 { font-size: 1.35rem; } .summary { font-size: 1rem; }
  th, td { padding: 5px 8px; } .scroll > svg { min-width: 600px; }
  .panels svg { min-width: 420px !important; }
  tbody th { white-space: normal; } #results thead th { min-width: 0; }
  .words th, .words td { display: block; border-bottom: 0; }
  .words thead { display: none; }
  .words td { padding-top: 0; } .words th { padding-bottom: 0; }
}
@media print {
  section, .tile { break-inside: avoid; } .scroll { overflow: visible; }
  svg { min-width: 0; }
}
""" + ''.join(
  f'.line.{k}, .thin.{k} {{ stroke: var(--{k}); }} '
  f'.point.{k} {{ fill: var(--{k}); }} .key.{k} {{ background: var(--{k}); }}\n'
  for k in ('s1', 's2', 's3', 's4', 's5', 's6', 'before', 'after')
) + ''.join(
  f'.cell.h{i} {{ fill: var(--h{i}); }} .ramp .h{i} '
  f'{{ background: var(--h{i}); }}\n'
  for i in range(7)
)  # fmt: skip

SCRIPT = """
const tip = document.getElementById('tip');
function show(e) {
  const over = e.target.closest ? e.target.closest('[data-tip]') : null;
  tip.hidden = !over;
  if (!over) return;
  tip.textContent = over.dataset.tip;
  const box = tip.getBoundingClientRect();
  const x = Math.min(e.clientX + 14, innerWidth - box.width - 8);
  const below = e.clientY + 18 + box.height < innerHeight;
  tip.style.left = Math.max(8, x) + 'px';
  tip.style.top = (below ? e.clientY + 18 : e.clientY - box.height - 12) + 'px';
}
addEventListener('pointermove', show);
addEventListener('pointerdown', show);
addEventListener('scroll', () => { tip.hidden = true; }, true);
"""
