// What a reader's screen decides, and so cannot be built in: where formulas break, and which boxes scroll.
"use strict";
{
  // MathJax 3 sets a formula on one line. In pieces it wraps like text: a displayed one between its parts first, then
  // before relations, then before sums; one in a sentence after relations and before sums. Brackets stay whole.
  const OPEN = /mjx-c(28|5B|7B|27E8)\b/, CLOSE = /mjx-c(29|5D|7D|27E9)\b/;
  const isGap = (atom) =>
    !!atom && (parseFloat(atom.style.width) >= 0.9 || (atom.matches("mjx-mstyle") && isGap(atom.firstElementChild)));
  const isRelation = (atom) => !!atom && atom.matches('mjx-mo[space="4"]');
  const isSum = (atom) => !!atom && atom.matches('mjx-mo[space="3"]');

  const DISPLAYED = [(atom, last) => isGap(last) && !isGap(atom), isRelation, isSum];
  const IN_A_SENTENCE = [(atom, last) => isRelation(last) || isSum(atom)];

  function split(box, [starts, ...finer]) {
    if (!starts) return;
    const pieces = [[]];
    let depth = 0, last;
    for (const atom of box.children) {
      if (last && depth === 0 && starts(atom, last)) pieces.push([]);
      pieces.at(-1).push(atom);
      if (atom.matches("mjx-mo")) depth += OPEN.test(atom.innerHTML) - CLOSE.test(atom.innerHTML);
      last = atom;
    }
    if (pieces.length === 1) return split(box, finer);
    for (const atoms of pieces) {
      const piece = document.createElement("span");
      piece.className = "piece";
      piece.append(...atoms);
      box.append(piece);
      split(piece, finer);
    }
  }

  function wrapFormula(formula) {
    const math = formula.querySelector("mjx-math");
    const displayed = formula.hasAttribute("display");
    const size = parseFloat(getComputedStyle(formula).fontSize);
    if (math.offsetWidth < 10 * size) return; // a short one looks better whole
    formula.classList.add("wraps");
    split(math, displayed ? DISPLAYED : IN_A_SENTENCE);
  }

  // A formula keeps the comma behind it and the bracket before it on its line.
  function keepPunctuation(formula) {
    const before = formula.previousSibling, after = formula.nextSibling;
    const opening = before?.nodeType === Node.TEXT_NODE && before.data.match(/[(\[“‘]+$/);
    const closing = after?.nodeType === Node.TEXT_NODE && after.data.match(/^[,.;:!?)\]’”]+/);
    if (opening) formula.prepend(before.splitText(opening.index));
    if (closing) {
      after.splitText(closing[0].length);
      formula.append(after);
    }
  }

  // Boxes that may be wider than the screen, and what a screen reader calls them.
  const BOXES = {
    "mjx-container": "Formula",
    ".pst-scrollable-table-container": "Table",
    ".picture": "Figure",
    "pre": "Code or output",
    "div.output": "Output",
  };

  function markEdge(box, scrolls) {
    const rest = box.scrollWidth - box.clientWidth - box.scrollLeft;
    box.classList.toggle("goes-on", scrolls && rest > 8);
  }

  // A box that scrolls can be reached by keyboard and says what it is; one that does not stays out of the way.
  function markScrolling(box) {
    const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
    markEdge(box, scrolls);
    if (scrolls) {
      const kind = Object.keys(BOXES).find((selector) => box.matches(selector));
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", `${BOXES[kind]}, scrolls sideways`);
    } else if (box.getAttribute("aria-label")?.endsWith(", scrolls sideways")) {
      for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
    }
  }

  // Whoever closes a menu by the Escape key is back at the button that opened it.
  function returnToButton(side) {
    const button = document.querySelector(`.${side}-toggle`);
    const menu = document.getElementById(`pst-${side}-sidebar-modal`);
    menu?.addEventListener("keydown", (event) => {
      if (event.key === "Escape") setTimeout(() => button.focus());
    });
  }

  document.addEventListener("DOMContentLoaded", async () => {
    ["primary", "secondary"].forEach(returnToButton);
    await window.MathJax?.startup?.promise;
    document.querySelectorAll("mjx-container").forEach(wrapFormula);
    document.querySelectorAll("span.math").forEach(keepPunctuation);
    const boxes = document.querySelectorAll(Object.keys(BOXES).join(", "));
    const boxOf = (element) => element.closest(Object.keys(BOXES).join(", "));
    const watch = new ResizeObserver((entries) => entries.forEach((entry) => markScrolling(boxOf(entry.target))));
    for (const box of boxes) {
      [box, ...box.children].forEach((element) => watch.observe(element));
      box.addEventListener("scroll", () => markEdge(box, true), { passive: true });
    }
    document.fonts.addEventListener("loadingdone", () => boxes.forEach(markScrolling));
  });
}
