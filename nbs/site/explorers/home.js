// The whale of the home page: nothing is loaded before the reader asks, and each state says what it is
const $ = id => document.getElementById(id)
const here = new URL('.', import.meta.url)
let whale, tokenizer, about, running = false

async function wake() {
  const {load} = await import('./load.js');
  ({whale, tokenizer, about} = await load(new URL('whale/model', here).href, said => $('live-status').textContent = said))
}

async function write() {
  if (running) { running = false; return }
  running = true
  $('live-go').textContent = 'Stop'
  try {
    if (!whale) await wake()
    const {goOn} = await import('./whale.js')
    const begin = document.createElement('b')
    begin.textContent = $('live-text').value
    $('live-out').replaceChildren(begin)
    let tokens = 0
    for (const piece of goOn(whale, tokenizer, $('live-text').value, 80)) {
      if (!running) break
      $('live-out').append(piece)
      $('live-status').textContent = `${++tokens} tokens written, one after the other, by ${about.parameters.toLocaleString('en')} weights.`
      await new Promise(done => setTimeout(done))
    }
  } catch (error) { $('live-status').textContent = `The whale could not be loaded: ${error.message}` }
  running = false
  $('live-go').textContent = whale ? 'Write again' : 'Try again'
}

$('live-go').addEventListener('click', write)
$('live-text').addEventListener('keydown', e => { if (e.key==='Enter' && (e.ctrlKey || e.metaKey)) write() })
