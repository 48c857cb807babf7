"""The report page's style sheet: light and dark, no fonts or images from elsewhere, printable."""

CSS = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1c2024; --muted: #5f6770; --line: #e3e6ea; --soft: #f2f4f6;
  --good: #0a7a4b; --good-soft: #e3f4ec; --bad: #b3361b; --bad-soft: #fbe9e4; --open: #6b7280; --open-soft: #eef0f2;
  --accent: #0072b2;
  --c1: #0072b2; --c2: #d55e00; --c3: #009e73; --c4: #b2558f; --c5: #d18f00; --c6: #3d9bd6; --c7: #7a6f5d; --c8: #8a84d6; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131518; --card: #1a1d21; --ink: #e8eaed; --muted: #9aa3ad; --line: #2d3238; --soft: #22262b;
  --good: #5fd3a0; --good-soft: #16352a; --bad: #ff9b80; --bad-soft: #40211a; --open: #a3acb6; --open-soft: #272b31;
  --accent: #5db8ec;
  --c1: #4aaee8; --c2: #f58a4b; --c3: #3cc79c; --c4: #df8fc2; --c5: #eeb63d; --c6: #8fd0f5; --c7: #b9ab92; --c8: #b1acf0; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 3.5rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif; }
code, pre, .mono { font-family: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .88em; background: var(--soft); padding: .1em .35em; border-radius: 4px; }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: .15em; }
.layout { display: grid; grid-template-columns: 13rem minmax(0, 62rem); gap: 3rem; justify-content: center;
  padding: 0 1.5rem 5rem; }
nav { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow-y: auto; padding: 3.2rem 0 2rem; font-size: .87rem; }
nav ol { list-style: none; margin: 0; padding: 0; border-left: 1px solid var(--line); }
nav a { display: block; padding: .28rem 0 .28rem .9rem; color: var(--muted); text-decoration: none; line-height: 1.35;
  border-left: 2px solid transparent; margin-left: -1px; }
nav a:hover, nav a:focus-visible { color: var(--ink); border-left-color: var(--accent); }
header { padding: 3rem 0 1rem; }
h1 { font-size: 2.15rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .8rem; text-wrap: balance; }
h2 { font-size: 1.4rem; letter-spacing: -.01em; line-height: 1.25; margin: 3.4rem 0 .8rem; padding-top: 1.4rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; line-height: 1.4; margin: 1.8rem 0 .5rem; }
p, ul { margin: .6rem 0; max-width: 44rem; text-wrap: pretty; }
.lead { font-size: 1.08rem; color: var(--muted); }
.note { font-size: .86rem; color: var(--muted); margin: .4rem 0 0; line-height: 1.5; }
.command { display: block; background: var(--soft); border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem;
  margin: 1rem 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .88rem; }
.facts { display: flex; flex-wrap: wrap; gap: 1px; margin: 1.4rem 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
.facts div { flex: 1 1 9.5rem; background: var(--card); padding: .7rem 1rem; }
.facts dt { font-size: .74rem; color: var(--muted); letter-spacing: .02em; }
.facts dd { margin: .1rem 0 0; font-size: .95rem; font-weight: 600; overflow-wrap: anywhere; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; line-height: 1.45; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: .78rem; vertical-align: bottom; }
th, td { padding: .5rem .9rem .5rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr:last-child td { border-bottom: none; }
tfoot td { font-weight: 600; border-top: 2px solid var(--line); border-bottom: none; }
.num { text-align: right; white-space: nowrap; }
.num + :not(.num) { padding-left: 1.2rem; }
.claims td { padding-top: .8rem; padding-bottom: .8rem; }
.claims b { font-weight: 600; }
.claims .num { font-weight: 600; }
.claims .num span { display: block; font-weight: 400; color: var(--muted); font-size: .82rem; }
.claims .note { padding-left: 1rem; } .claims p.note { padding-left: 0; }
.claims .target { color: var(--muted); font-size: .82rem; min-width: 6rem; }
.mark { display: inline-block; white-space: nowrap; font-size: .78rem; font-weight: 600; border-radius: 99px;
  padding: .12rem .65rem; }
.holds { color: var(--good); background: var(--good-soft); }
.fails { color: var(--bad); background: var(--bad-soft); }
.open { color: var(--open); background: var(--open-soft); }
.bar { display: block; width: 11rem; height: 2.5rem; overflow: visible; }
.bar text { font-size: 9px; fill: var(--muted); }
.share { background: var(--soft); border-radius: 3px; height: .55rem; min-width: 5rem; margin-top: .45rem; }
.share i { display: block; height: 100%; border-radius: 3px; background: var(--c1); min-width: 2px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.2rem; margin: 1.2rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; min-width: 0; }
figure h3 { margin: 0 0 .5rem; }
figure svg { display: block; width: 100%; height: auto; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
details { font-size: .85rem; margin-top: .6rem; }
summary { color: var(--muted); cursor: pointer; }
.heat { width: auto; border-spacing: 3px; border-collapse: separate; }
.heat th { border: none; padding: .2rem .6rem .2rem 0; font-weight: 500; white-space: nowrap; }
.heat thead th { padding: 0 .3rem .2rem; text-align: center; }
.heat td { border: none; text-align: center; padding: .35rem .55rem; border-radius: 5px; min-width: 1.4rem; font-size: .84rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.2rem; margin: 1.2rem 0; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1rem 1.1rem; min-width: 0; }
.sample > div:first-child { display: flex; gap: .5rem; align-items: baseline; flex-wrap: wrap; }
.sample h3 { margin: 0; flex: 1 1 auto; }
.sample h4 { margin: .8rem 0 .2rem; font-size: .74rem; font-weight: 600; color: var(--muted); }
.sample pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .83rem; line-height: 1.5; }
.sample .think { color: var(--muted); border-left: 3px solid var(--line); padding-left: .8rem; max-height: 18rem; overflow-y: auto; }
.sample .say { font-weight: 600; }
footer { margin-top: 4rem; padding-top: 1.2rem; border-top: 1px solid var(--line); color: var(--muted); font-size: .85rem; }
@media (max-width: 70rem) { .layout { grid-template-columns: minmax(0, 62rem); gap: 0; }
  nav { position: sticky; z-index: 1; background: var(--page); padding: .55rem 0; border-bottom: 1px solid var(--line);
    overflow-x: auto; }
  nav ol { display: flex; gap: 1.1rem; border: none; white-space: nowrap; }
  nav a { padding: 0; border: none; margin: 0; } header { padding-top: 1.6rem; } }
@media (max-width: 44rem) { .layout { padding: 0 1rem 3rem; } h1 { font-size: 1.65rem; }
  .claims thead { display: none; }
  .claims tr { display: grid; grid-template-columns: 1fr auto auto; column-gap: 1rem; padding: .9rem 0; border-bottom: 1px solid var(--line); }
  .claims td { border: none; padding: .15rem 0; } .claims td:nth-child(2) { grid-column: 1 / -1; order: 1; }
  .claims .num + .target { padding-left: 0; }
  .claims .wide { grid-column: 1 / -1; order: 2; } .claims .note { margin-top: .2rem; } }
@media print { nav { display: none; } .layout { display: block; } figure, .sample { break-inside: avoid; } }
"""
