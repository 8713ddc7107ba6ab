// Wide tables scroll sideways on a phone. The theme's wrapper takes the focus, so that the arrow keys scroll it too.
window.addEventListener("load", () => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap")) {
    table.tabIndex = 0;
    table.setAttribute("role", "region");
    table.setAttribute("aria-label", "table");
  }
});
