"use strict";
// Tables of class "sortable": a click on a heading sorts by its column, another one turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") === "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what is empty stays last
        const numbers = [Number(x), Number(y)];
        const order = numbers.some(Number.isNaN) ? x.localeCompare(y) : numbers[0] - numbers[1];
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}
// Legends: a box shows or hides the curve of its number in the chart beside it.
for (const box of document.querySelectorAll(".legend input")) {
  box.addEventListener("change", () => {
    const chart = box.closest("figure").querySelector("svg");
    for (const line of chart.querySelectorAll(`[data-line="${box.value}"]`)) {
      line.classList.toggle("hidden", !box.checked);
    }
  });
}
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    const text = button.parentElement.querySelector("pre").textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
      button.textContent = "Selected";
    }
  });
}
