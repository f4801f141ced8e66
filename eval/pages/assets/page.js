"use strict";
(() => {
  const root = document.documentElement;
  const onPaper = () => root.hasAttribute("data-printing");
  const json = (element) => JSON.parse(element.textContent);
  const darkColours = json(document.getElementById("dark-colours"));
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const coarsePointer = matchMedia("(pointer: coarse)");

  // Tables: a click on a heading sorts; numbers begin with the largest; what is missing is always last.
  const sortable = (table) => table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const heading = button.parentElement, numeric = heading.classList.contains("number"), body = table.tBodies[0];
    const before = heading.getAttribute("aria-sort");
    const direction = before ? (before === "ascending" ? "descending" : "ascending") : (numeric ? "descending" : "ascending");
    const sign = direction === "ascending" ? 1 : -1;
    const key = (row) => row.cells[column].dataset.key;
    const compare = numeric ? (a, b) => Number(a) - Number(b) || 0 : (a, b) => a.localeCompare(b, "en", {numeric: true});
    const order = (a, b) => (a === "" || b === "") ? (a === "") - (b === "") : sign * compare(a, b);
    body.append(...[...body.rows].sort((one, other) => order(key(one), key(other))));
    table.querySelectorAll("th").forEach((each) => each.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", direction);
  }));

  // A text to copy. Where the clipboard is not to be had, the text is selected instead.
  const copyable = (figure) => figure.querySelector(".copy").addEventListener("click", async () => {
    const text = figure.querySelector("pre"), status = figure.querySelector("[role=status]");
    try {
      await navigator.clipboard.writeText(text.textContent);
      status.textContent = "Copied.";
    } catch {
      getSelection().selectAllChildren(text);
      status.textContent = "Selected: press Ctrl+C or ⌘C.";
    }
  });

  // Colours are given as they are in light; in dark some are others.
  const themed = (value, dark) => {
    if (typeof value === "string") return dark && darkColours[value] || value;
    if (Array.isArray(value)) return typeof value[0] === "object" && !Array.isArray(value[0]) ? value.map((each) => themed(each, dark)) : value;
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, themed(each, dark)]));
  };

  // Large heat maps and long lines come as 16-bit integers, 1000 times the decimal logarithm, -32768 where there is no value.
  const unpacked = (trace) => {
    if (!trace.packed) return trace;
    const {packed, ...rest} = trace, bytes = Uint8Array.from(atob(packed.values), (letter) => letter.charCodeAt(0));
    const numbers = new DataView(bytes.buffer), levels = Array.from({length: bytes.length / 2}, (_, index) => numbers.getInt16(2 * index, true));
    if (!packed.columns) return {...rest, y: levels.map((cell) => cell === -32768 ? null : 10 ** (cell / 1000))};
    const width = packed.columns.length, z = [], customdata = [];
    for (let start = 0; start < levels.length; start += width) {
      const cells = levels.slice(start, start + width);
      z.push(cells.map((cell) => cell === -32768 ? null : cell / 1000));
      customdata.push(cells.map((cell, column) => [cell === -32768 ? 0 : 10 ** (cell / 1000), packed.columns[column]]));
    }
    return {...rest, z, customdata};
  };

  const themeLayout = () => {
    const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(name).trim();
    const font = {family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("--ink")};
    const axis = {gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"), tickcolor: colour("--line")};
    const modebar = {bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent")};
    const hoverlabel = {bgcolor: colour("--raised"), bordercolor: colour("--line"), font};
    return {axis, layout: {font, hoverlabel, modebar, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true, uirevision: "same",
      dragmode: coarsePointer.matches ? false : "zoom"}};
  };

  const put = (layout, name, value) => {
    const path = name.split("."), last = path.pop();
    path.reduce((place, key) => place[key] = {...place[key]}, layout)[last] = value;
  };

  const layoutOf = (pane, frame, dark) => {
    const theme = themeLayout(), layout = themed(pane.layout, dark);
    for (const [name, value] of Object.entries(frame.layout)) put(layout, name, value);
    for (const key of Object.keys(layout)) if (/^[xy]axis\d*$/.test(key)) layout[key] = {...theme.axis, ...layout[key]};
    if (layout.coloraxis && innerWidth < 600) put(layout, "coloraxis.colorbar.len", 1);
    return {...theme.layout, ...layout};
  };

  const config = {responsive: true, displaylogo: false, displayModeBar: coarsePointer.matches ? false : "hover", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]};

  // One figure: the controls choose a frame, every pane draws its own of that name.
  const picture = (element) => {
    const figure = json(element.querySelector(".figure-data")), plots = [...element.querySelectorAll(".plot")];
    const controls = [...element.querySelectorAll("select, input")];
    const draw = () => {
      const chosen = controls.map((control) => control.value).join("-"), dark = prefersDark.matches && !onPaper();
      figure.panes.forEach((pane, index) => {
        const frame = pane.frames[chosen];
        const layout = layoutOf(pane, frame, dark);
        if (onPaper()) layout.width = plots[index].clientWidth;
        Plotly.react(plots[index], themed(frame.data.map(unpacked), dark), layout, config);
      });
    };
    controls.forEach((control) => control.addEventListener(control.type === "range" ? "input" : "change", () => {
      if (control.type === "range") {
        const text = JSON.parse(control.dataset.options)[control.value];
        control.setAttribute("aria-valuetext", text);
        control.nextElementSibling.textContent = text;
      }
      draw();
    }));
    draw();
    return draw;
  };

  document.querySelectorAll("table").forEach(sortable);
  document.querySelectorAll("figure.code").forEach(copyable);
  const pictures = [...document.querySelectorAll("figure.picture")].map(picture);
  const redraw = () => pictures.forEach((draw) => draw());
  const print = (begins) => {
    root.toggleAttribute("data-printing", begins);
    redraw();
  };
  prefersDark.addEventListener("change", redraw);
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  root.dataset.ready = "true";
})();
