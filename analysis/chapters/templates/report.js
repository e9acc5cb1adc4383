// The page is whole without this: it sorts and filters tables, and tells points at a tap.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], rows = [...body.rows];
  const text = (row, i) => row.cells[i].textContent.trim();
  const missing = value => value === "–";
  const number = value => /^[<+−-]?[\d,]*\.?\d+(e[+-]?\d+)?( (%|MB|s|pp))?$/.test(value)
    ? parseFloat(value.replace(/[,<]/g, "").replace("−", "-")) : NaN;

  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const numbers = rows.every(row => missing(text(row, i)) || !isNaN(number(text(row, i))));
      rows.sort((one, other) => {
        const a = text(one, i), b = text(other, i);
        if (missing(a) || missing(b)) return missing(a) - missing(b);
        return way * (numbers ? number(a) - number(b)
          : a.localeCompare(b, undefined, {numeric: true}));
      });
      body.append(...rows);
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
    };
  });

  const box = document.createElement("div"), words = document.createElement("input");
  const shown = document.createElement("output"), picks = [];
  box.className = "filter";
  words.type = "search";
  words.placeholder = "filter: words of a row";
  words.setAttribute("aria-label", "rows with these words");
  box.append(words);
  heads.forEach((head, i) => {
    if (!("pick" in head.dataset)) return;
    const pick = document.createElement("select"), name = head.textContent.trim();
    pick.setAttribute("aria-label", name);
    pick.append(new Option(`every ${name}`, ""));
    for (const value of new Set(rows.map(row => text(row, i)))) pick.append(new Option(value, value));
    picks.push([i, pick]);
    box.append(pick);
  });
  box.append(shown);
  box.oninput = () => {
    const wanted = words.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const all = row.textContent.toLowerCase();
      row.hidden = !(wanted.every(word => all.includes(word))
        && picks.every(([i, pick]) => !pick.value || pick.value === text(row, i)));
    }
    shown.value = `${rows.filter(row => !row.hidden).length} of ${rows.length} shown`;
  };
  box.oninput();
  table.parentElement.before(box);
}

for (const drawing of document.querySelectorAll(".drawing")) {
  const points = [...drawing.querySelectorAll(".point")];
  const told = document.createElement("output");
  told.className = "told";
  drawing.append(told);
  const hint = document.createElement("span");
  hint.className = "hint";
  hint.textContent = " Point at a mark, or tap it.";
  if (points.length) drawing.parentElement.querySelector("figcaption").append(hint);
  // The browser's own tip is slow, and a finger has none.
  const words = points.map(point => point.removeChild(point.querySelector("title")).textContent);
  drawing.onpointermove = drawing.onpointerdown = event => {
    const frame = drawing.getBoundingClientRect();
    let best = 20, found = -1, below = 0;
    points.forEach((point, i) => {
      const at = point.getBoundingClientRect(), x = at.x + at.width / 2, y = at.y + at.height / 2;
      const away = Math.hypot(x - event.clientX, y - event.clientY);
      if (away < best) [best, found, below] = [away, i, at.bottom - frame.y + 6];
    });
    told.value = found < 0 ? "" : words[found];
    told.style.top = `${below}px`;
  };
  drawing.onpointerleave = () => { told.value = ""; };
}
