// Figures open at full size: click the picture, or its button in the corner. Escape, a click or the button
// closes it again, and the browser gives the focus back. Jupyter Book puts every script of this folder on
// every page.
document.addEventListener("DOMContentLoaded", () => {
  const pictures = document.querySelectorAll(".cell_output figure img");
  if (!pictures.length) return;

  const button = (label, sign) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = sign;
    made.setAttribute("aria-label", label);
    return made;
  };
  const dialog = document.createElement("dialog");
  dialog.className = "zoom";
  const large = document.createElement("img");
  large.alt = "";
  dialog.append(button("Close", "×"), large);
  document.body.append(dialog);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => { // one control: Tab stays on it, so that Escape closes
    if (event.key === "Tab") event.preventDefault();
  });

  for (const picture of pictures) {
    const open = () => {
      large.src = picture.src;
      large.alt = picture.alt;
      dialog.setAttribute("aria-label", picture.alt);
      dialog.showModal();
    };
    const frame = document.createElement("span");
    frame.className = `zoom-frame ${picture.className}`; // by-day, by-night
    picture.replaceWith(frame);
    const opener = button("Enlarge the figure", "⤢");
    opener.className = "zoom-open";
    opener.addEventListener("click", open);
    frame.append(picture, opener);
    picture.addEventListener("click", open);
  }
});
