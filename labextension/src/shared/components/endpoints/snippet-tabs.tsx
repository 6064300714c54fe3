// Ways to ask an endpoint: one language at a time, and a button that copies it.
import { useState } from 'preact/hooks';

import { useTrans } from '../../translation';
import { CopyButton } from '../parts';
import type { Snippet } from './snippets';

export function SnippetTabs({ all }: { all: readonly Snippet[] }) {
  const trans = useTrans();
  const [chosen, setChosen] = useState(all[0]?.title ?? '');
  const snippet = all.find(one => one.title === chosen) ?? all[0];
  if (!snippet) {
    return null;
  }
  return (
    <div class="llmc-part">
      <h3>{trans.__('Ask it from elsewhere')}</h3>
      <div class="llmc-row" role="group" aria-label={trans.__('Language')}>
        {all.map(one => (
          <button key={one.title} type="button" class="llmc-button" aria-pressed={one.title === snippet.title ? 'true' : 'false'}
            onClick={() => setChosen(one.title)}>
            {one.title}
          </button>
        ))}
        <CopyButton text={snippet.text} name={trans.__('Copy %1', snippet.title)} />
      </div>
      <pre class="llmc-code" tabIndex={0} aria-label={snippet.title}>{snippet.text}</pre>
    </div>
  );
}
