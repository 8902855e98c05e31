"""The style sheet of the report: system fonts, one column, light and dark by the reader's preference."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--card:#fff;--ink:#1c1d1f;
--soft:#62656b;--rule:#e3e3df;
--good:#0e7a4c;--bad:#b3261e;
--c0:#2a6fc9;--c1:#d9601f;--c2:#148f63;
--c3:#a87900;--c4:#7d4fc9;--c5:#c43b74;--c6:#0f8a9d;--c7:#6b7078}
@media (prefers-color-scheme:dark){:root{--bg:#151618;--card:#1c1e21;--ink:#e8e8e6;
--soft:#9a9ea6;--rule:#303338;
--good:#4cc38a;--bad:#ff8a80;
--c0:#6aa5f2;--c1:#f0905c;--c2:#45c795;
--c3:#dcb03f;--c4:#ab8df0;--c5:#ef7fac;--c6:#4fc3d6;--c7:#a4a9b1}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:40px 24px 80px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:20px;margin:44px 0 12px}
h3{font-size:15px;margin:24px 0 8px}
p{margin:0 0 12px}
.soft{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;margin-top:12px;font-size:14px}
a{color:var(--c0);text-decoration:none}
a:hover{text-decoration:underline}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 20px 6px 0;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--soft)}
.pass{color:var(--good);font-weight:600}
.fail{color:var(--bad);font-weight:600}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:16px}
figure{margin:0;padding:14px 16px 12px;background:var(--card);border:1px solid var(--rule);border-radius:8px}
figcaption{font-size:14px;font-weight:600;margin-bottom:8px}
svg{display:block;width:100%;height:auto}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--rule);stroke-width:1}
.line,.raw{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.raw{opacity:.25;stroke-width:1}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:8px 0 0;padding:0;
font-size:13px;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.legend b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.share{display:inline-block;height:8px;border-radius:2px;background:var(--c0);margin-right:8px;vertical-align:middle}
details{margin-top:14px;border:1px solid var(--rule);border-radius:8px;background:var(--card)}
summary{cursor:pointer;padding:8px 14px;font-size:14px;font-weight:600}
pre{margin:0;padding:4px 14px 14px;overflow-x:auto;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
@media print{body{background:#fff}figure{break-inside:avoid}}
"""
