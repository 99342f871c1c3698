"""The style sheet of the reports, for light and dark mode and any width."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f4f6f9; --card: #ffffff; --line: #dfe5ec; --ink: #17202c; --muted: #566173; --grid: #e4e9ef;
  --first: #2f6bd8; --second: #d9731a; --third: #178a6b; --pass: #14744f; --note: #8a5a00; --fail: #b3261e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #10151c; --card: #19202a; --line: #2c3643; --ink: #e8edf4; --muted: #a3b0c0; --grid: #2b3542;
  --first: #6ea3ff; --second: #f0a060; --third: #4fc9a4; --pass: #5fd3a3; --note: #e6b85c; --fail: #ff8f86; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 44px 0 14px; letter-spacing: -0.01em; }
h3 { font-size: 16px; margin: 0 0 10px; }
p { margin: 0 0 8px; max-width: 75ch; }
.lead { color: var(--muted); overflow-wrap: anywhere; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.numbers { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); margin: 22px 0 0; padding: 0; }
.numbers div, figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.numbers div { padding: 12px 16px; display: flex; flex-direction: column-reverse; }
.numbers dt { color: var(--muted); font-size: 14px; }
.numbers dd { margin: 0; font-size: 25px; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; }
figure { margin: 0; padding: 18px 18px 14px; display: flex; flex-direction: column; }
figure svg { width: 100%; height: auto; display: block; overflow: visible; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: 14.5px; margin-top: 10px; }
.nothing { flex: 1; min-height: 120px; display: grid; place-items: center; text-align: center; padding: 20px; color: var(--muted);
  border: 1.5px dashed var(--muted); border-radius: 8px; }
.card { padding: 4px 18px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: left; vertical-align: top; padding: 10px 14px 10px 0; border-bottom: 1px solid var(--line); }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--muted); font-size: 13.5px; font-weight: 600; }
tbody th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.why { display: block; color: var(--muted); font-weight: 400; font-size: 14px; }
.state { display: inline-block; min-width: 48px; padding: 1px 10px; border: 1.5px solid; border-radius: 99px; font-size: 13px;
  font-weight: 650; text-align: center; }
.pass { color: var(--pass); } .note { color: var(--note); } .fail { color: var(--fail); }
code { font: 13.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
details { padding: 8px 0; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 560px) {
  main { padding: 20px 12px 48px; } h1 { font-size: 25px; } h2 { margin-top: 34px; } figure { padding: 14px 12px 12px; }
  .numbers { grid-template-columns: repeat(2, 1fr); } .card { padding: 2px 14px; }
  .checks thead { display: none; } .checks tr { display: block; padding: 12px 0; border-bottom: 1px solid var(--line); }
  .checks tr:last-child { border: 0; } .checks th, .checks td { display: block; border: 0; padding: 0 0 4px; text-align: left; }
  .checks td.number::before { content: attr(data-label) ": "; color: var(--muted); } }
@media print { body { background: none; } figure, .card, .numbers div { break-inside: avoid; } }
"""
