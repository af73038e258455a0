// A text, the experts that the trained whale's routers choose for each token, and what the bias does to the choice
import {route} from '../whale.js'
import {$, COLORS, EXPERTS, bar, el, number, percent, show, tokenRow, visible} from '../ui.js'
import {load} from '../load.js'

const FOLDER = '../whale/model'
let whale, tokenizer, pieces = [], scores = [], biases = [], layer = 0, chosen = 0

const trained = l => Array.from(whale.get(`model.layers.${l}.mlp.gate.e_score_correction_bias`))
const choose = (s, bias) => route(s, bias, whale.config.num_experts_per_tok, whale.config.routed_scaling_factor)
const none = () => Array(whale.config.n_routed_experts).fill(0)
const same = (a, b) => [...a.experts].sort().join()===[...b.experts].sort().join()

function read() {                                   // run the whale over the text, and keep every router's scores
  const memory = whale.memory(), ids = tokenizer.encode($('text').value)
  whale.step(whale.config.bos_token_id, memory)
  scores = ids.map(id => whale.step(id, memory).layers.map(l => Array.from(l.moe.scores)))
  pieces = ids.map(id => tokenizer.decode([id]))
  chosen = Math.max(0, Math.min(chosen, ids.length-1))
  draw()
}

function paint(choice, changed) {
  return (button, i) => {
    let left = 0
    const total = choice[i].weights.reduce((a, b) => a+b, 0)
    choice[i].experts.forEach((e, n) => {
      const width = 100*choice[i].weights[n]/total
      button.append(el('i', {style: `left: ${left}%; width: ${width}%; background: ${EXPERTS[e]}`}))
      left += width
    })
    button.title = `experts ${choice[i].experts.map(e => e+1).join(' and ')}`
    if (changed[i]) button.classList.add('other')
  }
}

function detail(s, bias, {experts, weights}) {
  const rows = s.map((score, e) => el('tr', {class: experts.includes(e) ? 'chosen' : ''},
    el('td', {}, el('span', {style: `color: ${EXPERTS[e]}`}, '■'), ` ${e+1}`), el('td', {}, number(score)), el('td', {}, `${bias[e]<0 ? '' : '+'}${number(bias[e])}`),
    el('td', {}, number(score+bias[e])), el('td', {}, experts.includes(e) ? number(weights[experts.indexOf(e)]) : '–')))
  const head = ['expert', 'score', 'bias', 'together', 'weight'].map(name => el('th', {scope: 'col'}, name))
  show('detail', el('table', {}, el('thead', {}, el('tr', {}, ...head)), el('tbody', {}, ...rows)),
    el('p', {class: 'soft'}, `The two highest in “together” are chosen. Their weights are their shares of the plain scores, times ${whale.config.routed_scaling_factor}.`))
}

function draw() {
  const on = $('bias').checked, E = whale.config.n_routed_experts, bias = on ? biases[layer] : none()
  const at = scores.map(s => s[layer]), choice = at.map(s => choose(s, bias)), changed = at.map(s => !same(choose(s, biases[layer]), choose(s, none())))
  tokenRow($('tokens'), pieces, chosen, i => { chosen = i; draw() }, paint(choice, changed))
  const load = none()
  for (const {experts} of choice) for (const e of experts) load[e]++
  const share = whale.config.num_experts_per_tok/E, n = Math.max(1, choice.length)
  show('load', ...load.flatMap((count, e) => [el('span', {}, `expert ${e+1}`), bar(count/n, EXPERTS[e], share), el('span', {class: 'number'}, percent(count/n))]))
  const many = changed.filter(Boolean).length
  $('changed').textContent = `${many} of ${pieces.length} tokens ${on ? 'would have other experts without the bias' : 'have other experts than with it'} (violet line above).`
  if (!$('biases').contains(document.activeElement)) show('biases', ...biases[layer].map((b, e) => {
    const out = el('output', {}, number(b, 2))
    return el('label', {style: `--tint: ${EXPERTS[e]}`}, `expert ${e+1}`, el('input', {type: 'range', min: -1, max: 1, step: .01, value: b, name: `b${e}`,
      oninput: e => { biases[layer][+e.target.name[1]] = +e.target.value; out.textContent = number(+e.target.value, 2); $('bias').checked = true; draw() }}), out)
  }))
  if (pieces.length) { $('which').textContent = `“${visible(pieces[chosen]).trim()}”`; detail(at[chosen], bias, choice[chosen]) }
  else { $('which').textContent = 'a token'; show('detail') }
}

function layers(count) {
  for (let l=0; l<count; l++) $('layers').append(el('label', {}, el('input', {type: 'radio', name: 'layer', value: l, checked: l===layer, onchange: () => { layer = l; draw() }}), `${l+1}`))
}

let timer
try {
  ({whale, tokenizer} = await load(FOLDER, s => $('status').textContent = s))
  biases = Array.from({length: whale.config.num_hidden_layers}, (_, l) => trained(l))
  layers(biases.length)
  show('legend', ...none().flatMap((_, e) => [el('span', {style: `color: ${EXPERTS[e]}`}, '■'), ` expert ${e+1}  `]), ' — the bar under a token shows its two, each as wide as its weight')
  $('text').oninput = () => { clearTimeout(timer); timer = setTimeout(read, 150) }
  $('bias').onchange = draw
  $('reset').onclick = () => { biases[layer] = trained(layer); $('bias').checked = true; draw() }
  read()
  $('status').textContent = 'The routers are those of the small trained whale; what the layers before did is left as it was trained.'
} catch (error) { $('status').textContent = error.message; $('status').classList.add('fail') }
