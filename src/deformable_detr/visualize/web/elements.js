// HTML and SVG elements, for all pages: el("p", { class: "note", onclick: action }, child, …).
const SVG = "http://www.w3.org/2000/svg";

function fillElement(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}
const el = (tag, attributes = {}, ...children) => fillElement(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fillElement(document.createElementNS(SVG, tag), attributes, children);
const button = (attributes, ...content) => el("button", { type: "button", ...attributes }, ...content);
const byId = (id) => document.getElementById(id);
