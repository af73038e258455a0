// The trained whale and its tokenizer, from a checkpoint folder beside the page
import {Whale} from './whale.js'
import {Tokenizer} from './tokenizer.js'

const get = async url => {
  const answer = await fetch(url)
  if (!answer.ok) throw Error(`${url} is not there; \`python nbs/site/explorers/build.py\` makes it`)
  return answer
}

export async function load(folder, tell=()=>{}) {   // model, tokenizer, about.json, and bytes read
  const [config, tokenizer, about] = await Promise.all(['config', 'tokenizer', 'about'].map(async name => (await get(`${folder}/${name}.json`)).json()))
  const answer = await get(`${folder}/model.safetensors`), total = +answer.headers.get('content-length'), parts = []
  let size = 0
  for (let reader = answer.body.getReader(), part; !(part = await reader.read()).done;) {
    parts.push(part.value); size += part.value.length
    tell(`Reading the whale: ${(size/1e6).toFixed(1)}${total>=size ? ` of ${(total/1e6).toFixed(1)}` : ''} MB`)
  }
  return {whale: new Whale(config, await new Blob(parts).arrayBuffer()), tokenizer: new Tokenizer(tokenizer), about, size}
}
