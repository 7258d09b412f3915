// Marks tables that are wider than the page, and writes the name of its column on each cell. On a narrow screen
// stylesheets/extra.css then shows each row of a marked table as a list.
const tables = document.querySelectorAll(".md-typeset table:not([class])");

for (const table of tables) {
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  for (const row of table.tBodies[0].rows) {
    [...row.cells].forEach((cell, i) => (cell.dataset.column = names[i]));
  }
}

function mark() {
  for (const table of tables) {
    delete table.dataset.wide;
    if (table.scrollWidth > table.closest("article").clientWidth) table.dataset.wide = "";
  }
}

mark();
addEventListener("resize", mark);
