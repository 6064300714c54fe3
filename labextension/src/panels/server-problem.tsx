import { useEffect, useState } from 'preact/hooks';

import { Problem } from '../shared/components/parts';
import type { Panels } from './tokens';

/** Says that the server extension is missing or of another version; nothing while all is well. */
export function ServerProblem({ panels }: { panels: Panels }) {
  const [text, setText] = useState(panels.serverProblem);
  useEffect(() => {
    const take = (_: unknown, problem: string) => setText(problem);
    panels.serverProblemChanged.connect(take);
    setText(panels.serverProblem);
    return () => {
      panels.serverProblemChanged.disconnect(take);
    };
  }, [panels]);
  return text ? (
    <div class="llmc-card llmc-panel">
      <Problem text={text} />
    </div>
  ) : null;
}
