// Byte-level BPE, as nanowhale's tokenizer.json describes it: text -> words -> bytes -> merged again in the order that was learned.

// The pieces that no merge may cross: English endings, words, numbers, marks, and blanks, of which the last stays with the next word
const WORDS = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu

// A byte is written as a visible letter: itself where it is one, else one from 256 on
const shown = b => b>=33 && b<=126 || b>=161 && b<=172 || b>=174
let hidden = 256
const LETTERS = Array.from({length: 256}, (_, b) => String.fromCharCode(shown(b) ? b : hidden++))
const BYTES = Object.fromEntries(LETTERS.map((c, b) => [c, b]))

export class Tokenizer {
  constructor({model, added_tokens}) {              // the contents of tokenizer.json
    this.ids = new Map(Object.entries(model.vocab))
    this.ranks = new Map(model.merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(' ') : pair, rank]))
    this.special = new Map(added_tokens.map(t => [t.content, t.id]))
    this.tokens = []
    for (const [token, id] of [...this.ids, ...this.special]) this.tokens[id] = token
    const marks = [...this.special.keys()].map(s => s.replace(/[^\w]/g, '\\$&'))
    this.marks = marks.length ? new RegExp(`(${marks.join('|')})`) : /(?!)/
  }

  merge(word) {                                     // letters of one piece -> its tokens
    let parts = [...word]
    while (parts.length>1) {
      let best = Infinity, at = -1
      for (let i=0; i+1<parts.length; i++) {
        const rank = this.ranks.get(parts[i]+' '+parts[i+1])
        if (rank<best) { best = rank; at = i }
      }
      if (at<0) break
      parts.splice(at, 2, parts[at]+parts[at+1])
    }
    return parts
  }

  encode(text) {                                    // ids, without a mark for the beginning
    const out = []
    for (const piece of text.split(this.marks)) {
      if (this.special.has(piece)) { out.push(this.special.get(piece)); continue }
      for (const [word] of piece.matchAll(WORDS)) {
        const letters = Array.from(new TextEncoder().encode(word), b => LETTERS[b]).join('')
        for (const token of this.merge(letters)) out.push(this.ids.get(token))
      }
    }
    return out
  }

  decode(ids) {                                     // text; marks are left out, half a character reads as U+FFFD
    const bytes = ids.filter(id => !this.special.has(this.tokens[id])).flatMap(id => Array.from(this.tokens[id], c => BYTES[c]))
    return new TextDecoder().decode(Uint8Array.from(bytes))
  }
}
