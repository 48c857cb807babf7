// Names of TeX symbols and what they are in Unicode, by the role they play in a formula. Data for tex.js.

const pairs = (text) =>
  text
    .trim()
    .split(/\s+/)
    .map((pair) => pair.split("="));

/** Letters and other identifiers. */
export const LETTERS = new Map(
  pairs(`alpha=α beta=β gamma=γ delta=δ epsilon=ϵ varepsilon=ε zeta=ζ eta=η theta=θ vartheta=ϑ iota=ι kappa=κ lambda=λ
  mu=μ nu=ν xi=ξ omicron=ο pi=π varpi=ϖ rho=ρ varrho=ϱ sigma=σ varsigma=ς tau=τ upsilon=υ phi=ϕ varphi=φ chi=χ psi=ψ
  omega=ω Gamma=Γ Delta=Δ Theta=Θ Lambda=Λ Xi=Ξ Pi=Π Sigma=Σ Upsilon=Υ Phi=Φ Psi=Ψ Omega=Ω hbar=ℏ ell=ℓ wp=℘ Re=ℜ
  Im=ℑ aleph=ℵ beth=ℶ infty=∞ partial=∂ nabla=∇ emptyset=∅ varnothing=∅ imath=ı jmath=ȷ angle=∠ triangle=△ square=□
  Box=□ blacksquare=■ top=⊤ bot=⊥ degree=° checkmark=✓ prime=′ dagger=† S=§ pounds=£ euro=€ clubsuit=♣ diamondsuit=♢
  heartsuit=♡ spadesuit=♠ complement=∁ measuredangle=∡ backprime=‵ star=⋆ bigstar=★ lozenge=◊`),
);

/** Operators and relations. */
export const OPERATORS = new Map(
  pairs(`times=× div=÷ cdot=⋅ pm=± mp=∓ ast=∗ circ=∘ bullet=∙ oplus=⊕ ominus=⊖ otimes=⊗ oslash=⊘ odot=⊙ cap=∩ cup=∪
  sqcap=⊓ sqcup=⊔ vee=∨ lor=∨ wedge=∧ land=∧ setminus=∖ smallsetminus=∖ neg=¬ lnot=¬ amalg=⨿ wr=≀
  leq=≤ le=≤ leqslant=⩽ geq=≥ ge=≥ geqslant=⩾ neq=≠ ne=≠ approx=≈ equiv=≡ cong=≅ sim=∼ simeq=≃ propto=∝ ll=≪ gg=≫
  doteq=≐ asymp=≍ prec=≺ succ=≻ preceq=⪯ succeq=⪰ subset=⊂ supset=⊃ subseteq=⊆ supseteq=⊇ subsetneq=⊊ supsetneq=⊋
  nsubseteq=⊈ sqsubseteq=⊑ sqsupseteq=⊒ in=∈ notin=∉ ni=∋ mid=∣ nmid=∤ parallel=∥ nparallel=∦ perp=⟂ vdash=⊢ dashv=⊣
  models=⊨ vDash=⊨ forall=∀ exists=∃ nexists=∄ therefore=∴ because=∵ coloneqq=≔ triangleq=≜ lesssim=≲ gtrsim=≳
  to=→ rightarrow=→ leftarrow=← gets=← leftrightarrow=↔ Rightarrow=⇒ Leftarrow=⇐ Leftrightarrow=⇔ implies=⟹
  impliedby=⟸ iff=⟺ longrightarrow=⟶ longleftarrow=⟵ Longrightarrow=⟹ Longleftarrow=⟸ Longleftrightarrow=⟺
  longleftrightarrow=⟷ mapsto=↦ longmapsto=⟼ hookrightarrow=↪ hookleftarrow=↩ uparrow=↑ downarrow=↓ updownarrow=↕
  Uparrow=⇑ Downarrow=⇓ nearrow=↗ searrow=↘ swarrow=↙ nwarrow=↖ rightleftharpoons=⇌ rightharpoonup=⇀ leadsto=⇝
  ldots=… cdots=⋯ dots=… dotsc=… dotsb=⋯ vdots=⋮ ddots=⋱ colon=: lbrace={ rbrace=} lbrack=[ rbrack=] vert=|
  Vert=‖ lvert=| rvert=| lVert=‖ rVert=‖ langle=⟨ rangle=⟩ lfloor=⌊ rfloor=⌋ lceil=⌈ rceil=⌉ backslash=\\ triangleleft=◁
  triangleright=▷ bowtie=⋈ upharpoonright=↾ dotso=… And=&`),
);

/** Large operators; true where limits stand above and below in displayed formulas. */
export const LARGE = new Map([
  ...pairs(`sum=∑ prod=∏ coprod=∐ bigcup=⋃ bigcap=⋂ bigvee=⋁ bigwedge=⋀ bigoplus=⨁ bigotimes=⨂ bigodot=⨀
  biguplus=⨄ bigsqcup=⨆`).map(([name, sign]) => [name, [sign, true]]),
  ...pairs("int=∫ iint=∬ iiint=∭ oint=∮ smallint=∫").map(([name, sign]) => [name, [sign, false]]),
]);

/** Functions set upright; true where limits stand below. */
export const FUNCTIONS = new Map([
  ..."sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth log ln lg exp deg dim ker hom arg"
    .split(" ")
    .map((name) => [name, false]),
  ..."lim max min sup inf det gcd Pr limsup liminf argmax argmin".split(" ").map((name) => [name, true]),
]);

/** Marks above or below: [sign, is it below, does it stretch]. */
export const ACCENTS = new Map([
  ["hat", ["^", false, false]],
  ["check", ["ˇ", false, false]],
  ["tilde", ["~", false, false]],
  ["acute", ["´", false, false]],
  ["grave", ["`", false, false]],
  ["dot", ["˙", false, false]],
  ["ddot", ["¨", false, false]],
  ["breve", ["˘", false, false]],
  ["bar", ["‾", false, false]],
  ["vec", ["→", false, false]],
  ["mathring", ["˚", false, false]],
  ["widehat", ["^", false, true]],
  ["widetilde", ["~", false, true]],
  ["overrightarrow", ["→", false, true]],
  ["overleftarrow", ["←", false, true]],
  ["overbrace", ["⏞", false, true]],
  ["underbrace", ["⏟", true, true]],
]);

/** Spaces in em. */
export const SPACES = new Map([
  [",", "0.167em"],
  ["thinspace", "0.167em"],
  [":", "0.222em"],
  [">", "0.222em"],
  [";", "0.278em"],
  ["!", "-0.167em"],
  ["enspace", "0.5em"],
  [" ", "0.25em"],
  ["~", "0.25em"],
  ["quad", "1em"],
  ["qquad", "2em"],
]);

// Where the letters of an alphabet begin in Unicode: [capitals, small letters, digits], 0 for none.
const ALPHABETS = {
  bold: [0x1d400, 0x1d41a, 0x1d7ce],
  script: [0x1d49c, 0x1d4b6, 0],
  fraktur: [0x1d504, 0x1d51e, 0],
  double: [0x1d538, 0x1d552, 0x1d7d8],
  sans: [0x1d5a0, 0x1d5ba, 0x1d7e2],
  mono: [0x1d670, 0x1d68a, 0x1d7f6],
};
// Letters that had a place of their own before the alphabets came.
const EARLIER = {
  script: { B: "ℬ", E: "ℰ", F: "ℱ", H: "ℋ", I: "ℐ", L: "ℒ", M: "ℳ", R: "ℛ", e: "ℯ", g: "ℊ", o: "ℴ" },
  fraktur: { C: "ℭ", H: "ℌ", I: "ℑ", R: "ℜ", Z: "ℨ" },
  double: { C: "ℂ", H: "ℍ", N: "ℕ", P: "ℙ", Q: "ℚ", R: "ℝ", Z: "ℤ" },
};
const FONTS = {
  mathbf: "bold",
  boldsymbol: "bold",
  bm: "bold",
  bold: "bold",
  mathcal: "script",
  mathscr: "script",
  mathfrak: "fraktur",
  mathbb: "double",
  Bbb: "double",
  mathsf: "sans",
  mathtt: "mono",
  mathrm: "upright",
  mathit: "italic",
  mathnormal: "italic",
};

/** The alphabet of a font command, or undefined. */
export const fontOf = (name) => (Object.hasOwn(FONTS, name) ? FONTS[name] : undefined);

/** A letter or digit in an alphabet; itself where the alphabet has none. */
export function inAlphabet(alphabet, letter) {
  if (alphabet === "bold" && /[Α-Ωα-ω]/.test(letter)) {
    return String.fromCodePoint(letter.codePointAt(0) + (letter < "α" ? 0x1d6a8 - 0x391 : 0x1d6c2 - 0x3b1));
  }
  const earlier = EARLIER[alphabet]?.[letter];
  const bases = ALPHABETS[alphabet];
  if (earlier || !bases) return earlier || letter;
  const [base, first] = /[A-Z]/.test(letter)
    ? [bases[0], 65]
    : /[a-z]/.test(letter)
      ? [bases[1], 97]
      : [/\d/.test(letter) ? bases[2] : 0, 48];
  return base ? String.fromCodePoint(base + letter.charCodeAt(0) - first) : letter;
}
