// The long table of claims can be filtered: by verdict, by kind, by paper, and by a word. The controls are made
// here, so that a page without scripts shows the whole table and nothing that does not work. An address like
// claims.html#claim-C03 always shows its row.
document.addEventListener("DOMContentLoaded", () => {
  const table = document.querySelector("table.companion-claims");
  const rows = table ? [...table.tBodies[0].rows] : [];
  const papers = new Set(rows.map((row) => row.dataset.paper));
  if (papers.size < 2) return; // a chapter's own table is short

  const kinds = { empirical: "from experiments", theorem: "theorem or count", ours: "our own question" };
  const form = document.createElement("form");
  form.className = "claims-filter";
  form.setAttribute("role", "search");
  form.setAttribute("aria-label", "Filter the claims");
  form.addEventListener("submit", (event) => event.preventDefault());
  const fields = {};
  const field = (name, label, control) => {
    const box = document.createElement("label");
    box.append(label, control);
    control.name = name;
    fields[name] = control;
    form.append(box);
  };
  const choice = (name, label, values) => {
    const control = document.createElement("select");
    for (const [value, text] of [["", "all"], ...values]) control.append(new Option(text, value));
    field(name, label, control);
  };
  const distinct = (name) => [...new Set(rows.map((row) => row.dataset[name]))];
  choice("verdict", "Verdict ", distinct("verdict").map((v) => [v, v]));
  choice("kind", "Kind ", distinct("kind").map((v) => [v, kinds[v] ?? v]));
  choice("paper", "Paper ", distinct("paper").map((v) => [v, v]));
  const word = document.createElement("input");
  word.type = "search";
  field("word", "Word ", word);
  const count = document.createElement("output");
  form.append(count);
  table.closest(".companion-scroll").before(form);

  const show = () => {
    let shown = 0;
    for (const row of rows) {
      const fits = ["verdict", "kind", "paper"].every((n) => !fields[n].value || row.dataset[n] === fields[n].value);
      row.hidden = !fits || !row.textContent.toLowerCase().includes(word.value.trim().toLowerCase());
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} claims`;
  };
  const jump = () => {
    const row = location.hash && document.getElementById(location.hash.slice(1));
    if (!row || !row.hidden) return;
    form.reset();
    show();
    row.scrollIntoView();
  };
  form.addEventListener("input", show);
  window.addEventListener("hashchange", jump);
  show();
});
