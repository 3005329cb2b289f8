// What a reader would see amiss on a page, as lists of sentences; checks.py adds this to every page.
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const inside = (selector) => all(selector, document.querySelector("main") || document.body);
  const flat = (text) => (text || "").replace(/\s+/g, " ").trim().slice(0, 60);
  const says = (element) => `${element.localName} "${flat(element.alt || element.textContent)}"`;
  const shown = (element) => element.checkVisibility({ visibilityProperty: true });
  const unseen = (element) => element.closest("mjx-assistive-mml, .sr-only, .visually-hidden, .copybtn");

  // How many pixels of a thing its surroundings hide for good; a box that scrolls hides nothing, except on paper.
  const hidden = (element, rect, scrolls) => {
    for (let box = element; box && box !== document.body; box = box.parentElement) {
      const style = getComputedStyle(box), edge = box.getBoundingClientRect();
      if (/^(inline|contents)$/.test(style.display)) continue;
      if (scrolls && /auto|scroll/.test(style.overflowX)) return 0;
      const aside = style.overflowX === "visible" ? 0 : Math.max(edge.left - rect.left, rect.right - edge.right);
      const above = /hidden|clip/.test(style.overflowY) ? Math.max(edge.top - rect.top, rect.bottom - edge.bottom) - 1 : 0;
      if (Math.max(aside, above) > 1) return Math.round(Math.max(aside, above));
    }
    const beside = Math.max(rect.right - document.documentElement.clientWidth, -rect.left);
    return beside > 1 ? Math.round(beside) : 0;
  };

  const images = () => all("img").flatMap((img) => [
    ...(img.complete && img.naturalWidth ? [] : [`image does not load: ${img.src.slice(0, 90)}`]),
    ...(img.hasAttribute("alt") ? [] : [`image without alternative text: ${img.src.slice(0, 90)}`]),
  ]);

  const mathematics = (scrolls) => all(".math").filter(shown).flatMap((node) => {
    const formulas = all("mjx-container", node);
    if (!formulas.length) return [`formula not rendered: ${says(node)}`];
    return formulas.flatMap((formula) => {
      const pieces = all("mjx-math, .piece", formula).filter((x) => !x.querySelector(".piece"));
      const near = `near "${flat(node.closest("p, li, td, div").textContent)}"`;
      const rects = pieces.map((piece) => piece.getBoundingClientRect());
      if (formula.querySelector("mjx-merror")) return [`formula with an error, ${near}`];
      if (rects.some((rect) => rect.width < 2 || rect.height < 2)) return [`formula without extent, ${near}`];
      const cut = Math.max(...rects.map((rect) => hidden(formula, rect, scrolls)));
      return cut ? [`formula cut by ${cut} px, ${near}`] : [];
    });
  });

  const fonts = () => [...document.fonts].filter((font) => font.status === "error").map((font) => `font does not load: ${font.family}`);

  const overflow = (scrolls) => {
    const lost = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    const parts = inside("p, pre, table, img, svg, figure, dt, dd, li, h1, h2, h3, h4, code, input, summary");
    return [
      ...(lost > 0 ? [`the page is ${lost} px too wide`] : []),
      ...parts.filter((x) => shown(x) && !unseen(x)).flatMap((part) => {
        const rect = part.getBoundingClientRect();
        const cut = rect.width && hidden(part.parentElement, rect, scrolls);
        return cut ? [`cut by ${cut} px: ${says(part)}`] : [];
      }),
      ...(scrolls ? [] : inside("pre").filter((x) => shown(x) && x.scrollWidth > x.clientWidth + 1)
        .map((pre) => `cut by ${pre.scrollWidth - pre.clientWidth} px: ${says(pre)}`)),
    ];
  };

  // The smallest letters of a figure are 10 points at twice the page's pixels, and 8 in the style of 0.1.0; a picture's
  // width in the markup is its inches times 100.
  const labels = () => all("main .picture img, main .slider img").filter(shown).flatMap((img) => {
    const style = getComputedStyle(img), natural = Number(img.getAttribute("width")) || img.naturalWidth;
    const width = img.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    const points = img.naturalWidth > 1.5 * natural ? 10 : 8;
    const pixels = (points / 72) * 100 * (width / natural);
    return pixels < 9.45 ? [`labels of ${pixels.toFixed(1)} px in the figure ${says(img)}`] : [];
  });

  // A box that scrolls is reached and scrolled by keyboard, and says what it is.
  const scrollers = () => inside("*").flatMap((box) => {
    const style = getComputedStyle(box);
    const more = Math.max(
      /auto|scroll/.test(style.overflowX) ? box.scrollWidth - box.clientWidth : 0,
      /auto|scroll/.test(style.overflowY) ? box.scrollHeight - box.clientHeight : 0);
    if (more <= 1 || !shown(box) || unseen(box)) return [];
    return box.tabIndex >= 0 && box.ariaLabel ? [] : [`scrolls by ${more} px, but not by keyboard or without a name: ${says(box)}`];
  });

  const motion = () => all("body, body *").filter((x) => {
    const style = getComputedStyle(x);
    return style.animationName !== "none" || /[1-9]/.test(style.transitionDuration);
  }).map((x) => `moves although the reader wants no motion: ${x.localName}.${x.className}`);

  const folded = () => [
    ...all("details"), ...all(".toggle-hidden"),
  ].filter((x) => !x.lastElementChild.checkVisibility()).map((x) => `folded on paper: ${says(x)}`);

  const menus = () => all(".bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-area, .copybtn, .toggle-button")
    .filter(shown).map((x) => `a menu on paper: ${says(x)}`);

  // Whether a part of the page is on the screen: a closed menu is hidden, or waits beside it.
  const onScreen = (part) => {
    const box = part.getBoundingClientRect();
    return shown(part) && box.width > 0 && box.right > 0 && box.left < innerWidth;
  };

  // What a click on a button may change.
  const state = () => JSON.stringify([
    document.documentElement.dataset.mode,
    all("dialog").map((x) => x.open),
    all(".bd-sidebar, .dropdown-menu").map(onScreen),
  ]);

  // Where the Tab key should stop, each numbered, by what a reader would call it.
  const stops = () => all("a[href], button, input:not([type=hidden]), summary, [tabindex='0']")
    .filter((x) => x.tabIndex >= 0 && !x.disabled && shown(x) && !x.closest("dialog:not([open])"))
    .map((x, i) => {
      x.dataset.stop = i;
      return flat(x.ariaLabel || x.textContent || x.title);
    });

  window.faults = {
    state,
    stops,
    screen: (formulasScroll) => [...images(), ...fonts(), ...mathematics(formulasScroll), ...overflow(true), ...labels(), ...scrollers()],
    paper: () => [...images(), ...mathematics(false), ...overflow(false), ...folded(), ...menus()],
    motion,
  };
})();
