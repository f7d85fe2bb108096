// The gallery of schedules: a card with a small curve for each type.
import { element, formatText, request } from "./api.js";

const WIDTH = 132;
const HEIGHT = 44;

export class Gallery {
  constructor(dialog, onChoose) {
    this.dialog = dialog;
    this.onChoose = onChoose;
    this.cards = dialog.querySelector("#gallery-cards");
    this.search = dialog.querySelector("#gallery-search");
    this.search.addEventListener("input", () => this.filter());
    dialog.querySelector("#gallery-close").addEventListener("click", () => dialog.close());
  }

  // Load the types; return their names.
  async load() {
    const { types } = await request("gallery");
    this.cards.replaceChildren(...types.map((type) => this.buildCard(type)));
    return types.map(({ name }) => name);
  }

  open() {
    this.search.value = "";
    this.filter();
    this.dialog.showModal();
  }

  buildCard({ name, summary, points, feedback }) {
    const card = element(
      "button",
      { type: "button", className: "card", dataset: { search: `${name} ${summary}`.toLowerCase() } },
      element("strong", {}, ...breakWords(name)),
      drawCurve(points),
      element("span", { className: "muted" }, ...formatText(feedback ? `${summary} Uses the ${feedback}.` : summary)),
    );
    card.addEventListener("click", () => {
      this.dialog.close();
      this.onChoose(name);
    });
    return card;
  }

  filter() {
    const wanted = this.search.value.toLowerCase();
    for (const card of this.cards.children) card.hidden = !card.dataset.search.includes(wanted);
  }
}

function drawCurve(points) {
  const low = Math.min(...points);
  const high = Math.max(...points);
  const scale = (value) => (high > low ? 1 - (value - low) / (high - low) : 0.5);
  const place = (value, index) =>
    `${(2 + (index / (points.length - 1)) * (WIDTH - 4)).toFixed(1)},${(3 + scale(value) * (HEIGHT - 6)).toFixed(1)}`;
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.map(place).join(" "));
  svg.append(line);
  return svg;
}

// Allow line breaks between the words of a name such as CosineAnnealingLR.
function breakWords(name) {
  return name.split(/(?<=[a-z_])(?=[A-Z])|(?<=_)/).flatMap((word) => [word, document.createElement("wbr")]);
}
