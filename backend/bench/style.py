"""The style sheet of the report."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --page: #f7f7f5; --card: #ffffff; --ink: #1b1f24; --soft: #5d6670; --rule: #e3e4e1; --grid: #ecedea;
  --ours: #3654d8; --gloo: #c8722c; --bound: #6b7680; --d1: #3654d8; --d2: #6b83ea; --c1: #0f8a7e;
  --c2: #3da699; --g1: #8f4a10; --g2: #c06a25; --g3: #a8763f; --g4: #94806b; --compute: #87919b;
  --good: #187a45; --bad: #c0262d; }
@media (prefers-color-scheme: dark) { :root { --page: #121417; --card: #1a1d21; --ink: #e7e9ec; --soft: #99a3ad;
  --rule: #2c3137; --grid: #262a2f; --ours: #8499ff; --gloo: #e59a57; --bound: #96a1ab; --d1: #5b74f0;
  --d2: #3a4a9c; --c1: #1f9f92; --c2: #17665e; --g1: #b4652a; --g2: #95521f; --g3: #774119; --g4: #5c3314;
  --compute: #464d55; --good: #55c98a; --bad: #ff7b7b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 var(--sans); }
main { max-width: 1080px; margin: 0 auto; padding: 44px 28px 64px; }
.brand { display: flex; align-items: center; gap: 10px; color: var(--soft); font-size: 15px; }
.brand svg { width: 34px; height: 18px; }
.brand path { fill: none; stroke: var(--ours); stroke-width: 3; stroke-linecap: round; }
h1 { font-size: clamp(26px, 4vw, 38px); line-height: 1.15; letter-spacing: -0.02em; margin: 14px 0 8px;
  font-weight: 680; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 0 0 4px; font-weight: 650; }
h3 { font-size: 15px; margin: 0 0 2px; font-weight: 620; }
p { margin: 0 0 12px; }
.lead { color: var(--soft); font-size: 17px; max-width: 74ch; }
.note { color: var(--soft); font-size: 14px; max-width: 120ch; }
.busy { border-left: 3px solid var(--gloo); padding: 2px 0 2px 14px; margin: 18px 0 0; font-size: 15px;
  color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin: 26px 0 14px; }
.card, section { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.card { padding: 16px 18px; }
.card b { display: block; font-size: 27px; letter-spacing: -0.02em; font-weight: 660; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 14px; }
.card b.good { color: var(--good); }
.card b.bad { color: var(--bad); }
section { padding: 22px 24px 16px; margin-top: 14px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 10px 26px;
  margin-top: 10px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font: 12px var(--sans); fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .inside { fill: #fff; pointer-events: none; }
svg .lane, svg .value-plain { fill: var(--ink); font-size: 13px; }
svg .value { font-weight: 650; font-size: 13px; }
svg .value, svg .bound-label { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
svg .value.ours { fill: var(--ours); }
svg .value.gloo { fill: var(--gloo); }
.grid { stroke: var(--grid); }
.axis { stroke: var(--soft); }
.bound { stroke: var(--bound); stroke-dasharray: 4 3; stroke-width: 1.5; }
.curve { fill: none; stroke-width: 2.4; stroke-linejoin: round; }
.curve.ours { stroke: var(--ours); }
.curve.gloo { stroke: var(--gloo); }
.curve.copy { stroke: var(--bound); stroke-dasharray: 4 3; }
.dot.ours { fill: var(--ours); }
.dot.gloo { fill: var(--gloo); }
.dot.copy { fill: var(--bound); }
.d1 { fill: var(--d1); }
.d2 { fill: var(--d2); }
.c1 { fill: var(--c1); }
.c2 { fill: var(--c2); }
.compute { fill: var(--compute); }
.g1 { fill: var(--g1); }
.g2 { fill: var(--g2); }
.g3 { fill: var(--g3); }
.g4 { fill: var(--g4); }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; font-size: 14px; color: var(--soft); margin: 6px 0 0;
  padding: 0; list-style: none; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 7px;
  vertical-align: -1px; }
.legend i.ours { background: var(--ours); }
.legend i.gloo { background: var(--gloo); }
.legend i.bound { height: 0; border-top: 2px dashed var(--bound); border-radius: 0; vertical-align: 4px; }
.legend i.d1 { background: var(--d1); }
.legend i.d2 { background: var(--d2); }
.legend i.c1 { background: var(--c1); }
.legend i.c2 { background: var(--c2); }
.legend i.g1 { background: var(--g1); }
.legend i.g2 { background: var(--g2); }
.legend i.g3 { background: var(--g3); }
.legend i.g4 { background: var(--g4); }
.legend i.compute { background: var(--compute); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 15px;
  margin: 8px 0 6px; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead tr:first-child th { border-bottom: none; padding-bottom: 0; }
th.ours { color: var(--ours); }
th.gloo { color: var(--gloo); }
.tight th, .tight td { padding-left: 6px; padding-right: 6px; }
td.main { font-weight: 650; }
tbody tr:last-child td { border-bottom: none; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 5px 22px; margin: 10px 0; font-size: 15px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13.5px ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 560px) { main { padding: 26px 14px 40px; } section { padding: 16px 14px 10px; } .plots {
  grid-template-columns: 1fr; } dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } .figure {
  overflow-x: auto; } .figure svg { min-width: 640px; } }
@media print { body { background: #fff; } section, .card { break-inside: avoid; } }
"""
