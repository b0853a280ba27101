"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const theme = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const name = () => { theme.textContent = isDark() ? "Light theme" : "Dark theme"; };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  dark.addEventListener("change", name);
  theme.hidden = false;
  name();

  const key = (row, column) => {
    const cell = row.cells[column];
    const value = cell.dataset.value;
    return value ? Number(value) : value === "" && cell.textContent === "–" ? null : cell.textContent;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const first = column === 0 ? "ascending" : "descending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = head.getAttribute("aria-sort") === first ? other : first;
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", order);
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows].sort((r, s) => {
          const a = key(r, column), b = key(s, column);
          if (a === null || b === null) return (a === null) - (b === null);
          return sign * compare(a, b);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }
  for (const input of document.querySelectorAll("input[data-filter]")) {
    const table = input.closest(".block").querySelector("table");
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase();
      for (const row of table.tBodies[0].rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(words);
    });
  }

  const get = (id) => document.getElementById(id);
  const list = get("examples");
  const examples = [...list.children].map((element) => ({
    element,
    text: element.textContent.toLowerCase(),
    index: Number(element.dataset.index),
    change: Number(element.dataset.change),
    win: element.querySelector(".chip.win") !== null,
    loss: element.querySelector(".chip.loss") !== null,
  }));
  const orders = {
    worst: (a, b) => a.change - b.change,
    best: (a, b) => b.change - a.change,
    index: (a, b) => a.index - b.index,
  };
  const update = () => {
    const words = get("search").value.toLowerCase();
    const show = get("show").value;
    let count = 0;
    for (const example of examples) {
      const shown = example.text.includes(words) && (show === "all" || example[show]);
      example.element.hidden = !shown;
      count += shown;
    }
    list.append(...[...examples].sort(orders[get("order").value]).map((example) => example.element));
    get("count").textContent = `${count} of ${examples.length} prompts`;
  };
  for (const id of ["search", "show", "order"]) get(id).addEventListener("input", update);
  get("marks").addEventListener("change", (event) => list.classList.toggle("unmarked", !event.target.checked));
  get("controls").hidden = false;
  update();
})();
