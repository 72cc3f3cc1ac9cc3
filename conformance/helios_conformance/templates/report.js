"use strict";
for (const command of document.querySelectorAll(".command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", () => {
    const text = command.querySelector("pre").textContent;
    const done = () => { button.textContent = "Copied"; };
    if (navigator.clipboard) { navigator.clipboard.writeText(text).then(done, () => {}); }
  });
  command.append(button);
}
const search = document.getElementById("search");
if (search) {
  search.parentElement.hidden = false;
  const rows = [...document.querySelectorAll("#cases tbody tr")];
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of rows) { row.hidden = !row.textContent.toLowerCase().includes(wanted); }
  });
}
