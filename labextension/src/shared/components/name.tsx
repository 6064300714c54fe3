import { splitName } from '../format';

/** A name that is shortened in its middle where it does not fit. */
export function Name({ text, class: className }: { text: string; class: string }) {
  const [head, tail] = splitName(text);
  return (
    <span class={className} title={text}>
      <span class="llmc-name-head">{head}</span>
      {tail && <span class="llmc-name-tail">{tail}</span>}
    </span>
  );
}
