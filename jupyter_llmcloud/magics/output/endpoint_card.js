// The card of an endpoint. A key comes in a message after a click, goes to the clipboard, and is kept nowhere here.

function element(tag, text, style) {
  const node = document.createElement(tag);
  node.textContent = text ?? '';
  node.style.cssText = style ?? '';
  return node;
}

async function copy(text) {
  if (navigator.clipboard?.writeText) {
    return navigator.clipboard.writeText(text);
  }
  const area = element('textarea', text, 'position:fixed;opacity:0');
  document.body.append(area);
  area.select();
  const copied = document.execCommand('copy');
  area.remove();
  if (!copied) {
    throw new Error('the browser does not allow copying');
  }
}

function render({ model, el }) {
  const card = element('div', '', 'border:1px solid #8884;border-radius:6px;padding:8px 12px;max-width:56em');
  const head = element('div', '', 'display:flex;gap:8px;align-items:center;flex-wrap:wrap');
  const button = element('button', 'Copy key', 'margin-left:auto;cursor:pointer');
  button.type = 'button';
  button.className = 'llmcloud-copy-key';
  const said = element('small', '');
  said.setAttribute('role', 'status');
  head.append(element('b', model.get('name')), element('code', model.get('url')), button, said);
  card.append(head);
  for (const [title, text] of Object.entries(model.get('snippets'))) {
    card.append(element('small', title), element('pre', text, 'margin:2px 0 6px;white-space:pre-wrap'));
  }
  const ask = () => {
    said.textContent = 'asking for a key';
    model.send({ kind: 'key' });
  };
  const answered = message => {
    if (message.kind === 'error') {
      said.textContent = message.message;
    } else if (message.kind === 'key') {
      copy(message.key).then(
        () => (said.textContent = 'copied'),
        error => (said.textContent = `not copied: ${error.message}`)
      );
    }
  };
  button.addEventListener('click', ask);
  model.on('msg:custom', answered);
  el.append(card);
  return () => {
    button.removeEventListener('click', ask);
    model.off('msg:custom', answered);
  };
}

export default { render };
