"use strict";
// Two texts in stretches of words, each with whether the other text lacks it.
const differences = (before, after) => {
  const cut = (text) => text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];
  const [a, b] = [cut(before), cut(after)];
  if (Math.max(a.length, b.length) > 1200) return [[[before, false]], [[after, false]]];
  const common = Array.from({length: a.length + 1}, () => new Uint16Array(b.length + 1));
  for (let i = a.length; i--;)
    for (let j = b.length; j--;)
      common[i][j] = a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const sides = [[], []];
  const add = (side, text, own) => {
    const last = sides[side].at(-1);
    if (last && last[1] === own) last[0] += text;
    else sides[side].push([text, own]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add(0, a[i++], false);
      add(1, b[j++], false);
    } else if (j === b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) add(0, a[i++], true);
    else add(1, b[j++], true);
  }
  return sides;
};
