"use strict";
// Everything is on the page without this script; it adds sorting, values under the pointer, and switches.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
for (const element of all("[hidden]")) element.hidden = element.id === "tip";

function sortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    // The first press brings the best to the top, the second the worst, the third the order of the experiment.
    const best = head.dataset.best === "lowest" ? "ascending" : "descending";
    const turns = { none: best, [best]: best === "ascending" ? "descending" : "ascending" };
    button.addEventListener("click", () => {
      const turn = column ? turns[head.getAttribute("aria-sort") ?? "none"] : undefined;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (turn) head.setAttribute("aria-sort", turn);
      const value = (row) => Number(row.cells[column].dataset.value ?? NaN);
      const sign = turn === "ascending" ? 1 : -1;
      // What is undefined comes last, whichever way the rest goes.
      const order = (a, b) => Number(isNaN(value(a))) - Number(isNaN(value(b))) || sign * (value(a) - value(b)) || 0;
      body.append(...(turn ? [...original].sort(order) : original));
    });
  });
}

function pointable(chart, tip) {
  const svg = chart.querySelector("svg");
  const marks = JSON.parse(chart.dataset.marks);
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
  ring.setAttribute("r", "4");
  ring.setAttribute("class", "ring");
  const reach = 30;
  const leave = () => {
    tip.hidden = true;
    ring.remove();
  };
  const point = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let nearest = null;
    let least = reach;
    for (const mark of marks) {
      const distance = Math.hypot(mark[0] - x, mark[1] - y);
      if (distance < least && !off.has(mark[3])) [nearest, least] = [mark, distance];
    }
    if (!nearest) return leave();
    ring.setAttribute("cx", nearest[0]);
    ring.setAttribute("cy", nearest[1]);
    svg.append(ring);
    tip.textContent = nearest[2];
    tip.hidden = false;
    const room = document.documentElement.clientWidth - tip.offsetWidth - 4;
    const above = box.top + nearest[1] / scale - tip.offsetHeight - 10;
    tip.style.left = `${Math.max(4, Math.min(room, box.left + nearest[0] / scale - tip.offsetWidth / 2))}px`;
    tip.style.top = `${above < 4 ? box.top + nearest[1] / scale + 12 : above}px`;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  // A finger that is lifted leaves too; what it has pointed at stays until it moves on.
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
  addEventListener("pointerdown", leave, { capture: true });
  addEventListener("scroll", leave, { passive: true });
}

// The rows that are hidden, by their index in the comparison.
const off = new Set();

function switchable(bar) {
  const buttons = all("button[data-of]", bar);
  const every = bar.querySelector("button:not([data-of])");
  const show = () => {
    for (const button of buttons) {
      const hidden = off.has(Number(button.dataset.of));
      button.setAttribute("aria-pressed", String(!hidden));
      for (const part of all(`[data-row="${button.dataset.of}"]`)) part.classList.toggle("off", hidden);
    }
    every.disabled = off.size === 0;
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const row = Number(button.dataset.of);
      if (!off.delete(row)) off.add(row);
      show();
    });
  }
  every.addEventListener("click", () => {
    off.clear();
    show();
  });
}

function selectable(gallery) {
  const [task, row] = all("select", gallery);
  const show = () => {
    for (const part of all("[data-task]", gallery)) part.hidden = task.value !== "" && part.dataset.task !== task.value;
    gallery.classList.toggle("one", row.value !== "");
    for (const part of all("figure[data-row]", gallery)) part.classList.toggle("chosen", part.dataset.row === row.value);
  };
  task.addEventListener("change", show);
  row.addEventListener("change", show);
  // Of many tasks, one at a time: all of them would be most of the page.
  if (all("option", task).length > 6) {
    task.selectedIndex = 1;
    show();
  }
}

all("table.sortable").forEach(sortable);
all("[data-marks]").forEach((chart) => pointable(chart, document.getElementById("tip")));
all(".rows").forEach(switchable);
all(".gallery").forEach(selectable);
