// The keyboard in the panels, whatever is drawn anew meanwhile and however slowly.
import { render } from 'preact';
import { useState } from 'preact/hooks';
import { act } from 'preact/test-utils';
import { afterEach, beforeEach, expect, test } from 'vitest';

import { Confirm } from '../src/shared/components/parts';
import { keepFocus } from '../src/shared/focus';

let place = document.createElement('div');
beforeEach(() => {
  place = document.createElement('div');
  document.body.append(place);
});
afterEach(() => {
  render(null, place);
  place.remove();
});

const button = (text: string) => [...place.querySelectorAll('button')].find(one => one.textContent === text) as HTMLButtonElement;
const press = (key: string, target: Element = document.activeElement ?? document.body) => {
  const event = new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true });
  target.dispatchEvent(event);
  return event;
};
/** What is drawn is drawn; effects, which come after the browser has shown it, have not run. */
const drawn = () => new Promise<void>(resolve => setTimeout(resolve));
/** Mutation observers have been told. */
const settled = () => new Promise<void>(resolve => setTimeout(resolve, 5));

function Asks({ onYes = () => undefined }: { onYes?: () => void }) {
  const [isAsking, setAsking] = useState(false);
  return (
    <article>
      <button type="button" disabled={isAsking} onClick={() => setAsking(true)}>
        Stop
      </button>
      {isAsking && <Confirm question="Sure?" doIt="Yes" isBusy={false} onYes={onYes} onNo={() => setAsking(false)} />}
    </article>
  );
}

test('a question has the focus as soon as it is seen: Esc at once answers it', async () => {
  render(<Asks />, place);
  button('Stop').focus();
  button('Stop').click();
  await Promise.resolve(); // it is drawn in a microtask; the browser shows it, and effects run, after that
  expect(place.querySelector('[role=alertdialog]')).not.toBeNull();
  expect(document.activeElement).toBe(button('Keep it'));
  expect(press('Escape').defaultPrevented).toBe(true);
  await drawn();
  expect(place.querySelector('[role=alertdialog]')).toBeNull();
  expect(document.activeElement).toBe(button('Stop'));
});

test('Esc answers a question also where nothing has the focus, or something around it', async () => {
  for (const target of [document.body, place]) {
    render(<Asks />, place);
    button('Stop').click();
    await drawn();
    (document.activeElement as HTMLElement).blur();
    press('Escape', target);
    await drawn();
    expect(place.querySelector('[role=alertdialog]')).toBeNull();
  }
});

test('Esc for something else is not taken from it', async () => {
  const other = document.createElement('input');
  document.body.append(other);
  render(<Asks />, place);
  button('Stop').click();
  await drawn();
  other.focus();
  expect(press('Escape').defaultPrevented).toBe(false);
  expect(place.querySelector('[role=alertdialog]')).not.toBeNull();
  button('Keep it').click();
  await drawn();
  expect(document.activeElement).toBe(other); // nor is the focus
  other.remove();
});

test('what is disabled while it works has the focus again afterwards', async () => {
  const Works = ({ isBusy }: { isBusy: boolean }) => (
    <form>
      <button type="button" disabled={isBusy}>
        Look
      </button>
    </form>
  );
  void act(() => render(<Works isBusy={false} />, place));
  const end = keepFocus(place);
  button('Look').focus();
  void act(() => render(<Works isBusy />, place));
  await settled();
  expect(document.activeElement).toBe(place.querySelector('form'));
  void act(() => render(<Works isBusy={false} />, place));
  await settled();
  expect(document.activeElement).toBe(button('Look'));
  expect(place.querySelector('form')?.hasAttribute('tabindex')).toBe(false);
  end();
});

test('where what had the focus is gone, the part around it has it', async () => {
  const Row = ({ isThere }: { isThere: boolean }) => (
    <section>
      <ul>
        {isThere && (
          <li>
            <button type="button">Revoke</button>
          </li>
        )}
      </ul>
      <button type="button">Other</button>
    </section>
  );
  void act(() => render(<Row isThere />, place));
  const end = keepFocus(place);
  button('Revoke').focus();
  void act(() => render(<Row isThere={false} />, place));
  await settled();
  expect(document.activeElement).toBe(place.querySelector('ul'));
  button('Other').focus();
  expect(place.querySelector('ul')?.hasAttribute('tabindex')).toBe(false);
  end();
});

test('a focus that was given up is not taken again', async () => {
  const Works = ({ isBusy }: { isBusy: boolean }) => (
    <form>
      <button type="button" disabled={isBusy}>
        Look
      </button>
    </form>
  );
  void act(() => render(<Works isBusy={false} />, place));
  const end = keepFocus(place);
  button('Look').focus();
  button('Look').blur(); // a click beside it
  await settled();
  void act(() => render(<Works isBusy />, place));
  await settled();
  expect(document.activeElement).toBe(document.body);
  end();
});
