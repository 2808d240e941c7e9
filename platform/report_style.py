"""Style sheet and script of the leaderboard's page."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--ink:#1b2430;--dim:#5f6b7a;--line:#dfe4ea;--page:#f6f8fa;--card:#fff;--head:#eef2f6;
--accent:#1b6ca8;--best:#e4f4ea;--bestink:#13653a;--bad:#b3261e;--badbg:#fdeceb;--note:#fff7e0;--noteline:#e3c76b}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ef;--dim:#98a4b3;--line:#2d3743;--page:#11161c;--card:#182028;
--head:#1f2933;--accent:#6db3e8;--best:#173a27;--bestink:#8fe0b0;--bad:#ff9d94;--badbg:#43211f;--note:#3a3216;
--noteline:#7a6a2b}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"DejaVu Sans",sans-serif}
main{max-width:1280px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:28px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 10px}
h3{font-size:14px;margin:0 0 4px;font-weight:600}
h3 small{font-weight:400;color:var(--dim)}
p{margin:8px 0;max-width:92ch}
.sub{color:var(--dim);margin:4px 0 14px}
.small,figcaption{font-size:13px;color:var(--dim)}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;padding:0;margin:0;list-style:none}
.legend li{display:flex;align-items:center;gap:7px;overflow-wrap:anywhere}
.legend b{font-weight:600}
.dot{display:inline-block;flex:none;width:20px;height:20px;border-radius:5px;color:#fff;font-size:12px;font-weight:700;
line-height:20px;text-align:center}
.notes{background:var(--note);border:1px solid var(--noteline);border-radius:8px;padding:8px 14px;margin:16px 0}
.notes ul{margin:4px 0;padding-left:20px}.notes details{margin:0}.notes summary{padding:2px 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.wide{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;border-bottom:1px solid var(--line);vertical-align:top}
tbody tr:last-child>*{border-bottom:0}
tbody tr:hover>*{background-color:color-mix(in srgb,var(--accent) 6%,var(--card))}
thead th{background:var(--head);font-size:13px;font-weight:600;vertical-align:bottom;position:sticky;top:0}
thead th.name{min-width:104px;max-width:220px;overflow-wrap:break-word}
.n{white-space:nowrap}
th[scope=row],.t{text-align:left}
th[scope=row]{font-weight:600;white-space:nowrap}
.scores th[scope=row],.scores thead th:first-child{position:sticky;left:0;z-index:1;background:var(--card)}
.scores thead th:first-child{background:var(--head);z-index:2}
.sortable thead th{cursor:pointer;user-select:none}
.sortable thead th:hover{color:var(--accent)}
.sortable thead th:focus-visible{outline:2px solid var(--accent);outline-offset:-2px}
th[aria-sort=ascending]::after{content:" ▲";font-size:10px}
th[aria-sort=descending]::after{content:" ▼";font-size:10px}
td .ci{display:block;font-size:12px;color:var(--dim);white-space:nowrap}
td .v{white-space:nowrap}
td.best{background:var(--best)}td.best .v{color:var(--bestink);font-weight:700}
td.pub,th.pub{color:var(--dim)}td.pub{white-space:nowrap}
.more{display:none}
.all .more{display:table-cell}
.badge{display:inline-block;font-size:12px;line-height:1.35;color:var(--bad);background:var(--badbg);border-radius:5px;
padding:1px 7px;text-align:left;overflow-wrap:anywhere;max-width:220px}
.toggle{display:flex;justify-content:flex-end;gap:8px;align-items:center;font-size:13px;color:var(--dim);margin:0 0 6px}
.grid-of{display:grid;grid-template-columns:repeat(auto-fill,minmax(262px,1fr));gap:12px}
.grid-of .card{padding:12px 12px 6px;break-inside:avoid}
svg.chart{width:100%;height:auto;display:block}
svg .grid{stroke:var(--line);stroke-width:1}
svg .pub{stroke:var(--dim);stroke-width:1.2;stroke-dasharray:4 3}
svg text{font-size:10px;font-family:inherit}
svg .tick,svg .publabel{fill:var(--dim)}svg .publabel{font-size:8.5px;paint-order:stroke;stroke:var(--card);stroke-width:3px}svg .bad{fill:var(--bad);font-weight:700}
svg.bar{display:block;margin:2px 0 0 auto;overflow:visible}
.over td{min-width:270px}.over .ci{display:inline;margin-left:7px}
.ranks td{text-align:center;min-width:104px;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.ranks table{width:auto}
.ranks thead th{text-align:center}.ranks thead th:first-child{text-align:left}
details{margin:10px 0}
summary{cursor:pointer;font-weight:600;padding:6px 0}
summary small{font-weight:400;color:var(--dim)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:14px}
figure{margin:0;padding:10px;break-inside:avoid}
figure img{max-width:100%;height:auto;display:block;background:#fff;border-radius:6px}
code{font:13px ui-monospace,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.empty{color:var(--dim);font-size:13px}
@media print{@page{size:A4 landscape;margin:12mm}
:root{color-scheme:light;--ink:#000;--dim:#555;--line:#ccc;--page:#fff;--card:#fff;--head:#eee;--accent:#1b6ca8;
--best:#e4f4ea;--bestink:#13653a;--bad:#b3261e;--badbg:#fdeceb;--note:#fff7e0;--noteline:#e3c76b}
body{font-size:11px;background:#fff}main{max-width:none;padding:0}th,td{padding:4px 6px}thead th,.scores th{position:static!important}
.wide{overflow:visible}.card{overflow:visible}.toggle{display:none}h2{break-after:avoid}tr{break-inside:avoid}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
@media (max-width:640px){main{padding:16px 10px}th,td{padding:6px 8px}}
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      // Numbers begin with the greatest, names with A; a second click turns it round. What has no value stays last.
      const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.every(row => key(row) === '' || !isNaN(key(row)));
      const before = head.getAttribute('aria-sort');
      const up = before ? before === 'descending' : !numeric;
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === '' || y === '') return (x === '') - (y === '');
        return (numeric ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener('click', sort);
    head.addEventListener('keydown', event => { if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); sort(); } });
  });
}
const all = document.getElementById('all-published');
if (all) all.addEventListener('change', () => document.getElementById('scores').classList.toggle('all', all.checked));
"""
