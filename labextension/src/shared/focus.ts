// Where the keyboard is: what is drawn anew, disabled or taken away must not lose it.
import { useLayoutEffect, useRef } from 'preact/hooks';

const FOCUSABLE = 'button, input, select, textarea, summary, a[href], [tabindex]';

const hasNoFocus = (page: Document) => !page.activeElement || page.activeElement === page.body;
const isOff = (element: Element | undefined) => element?.matches(':disabled') ?? false;

/**
 * Keep the focus inside `root` as long as it is there: where the element that has it is disabled or taken away, the
 * part around it takes it, and gives it back once the element can be used again. Else the next key would go to the page.
 *
 * Returns a function that ends this.
 */
export function keepFocus(root: HTMLElement): () => void {
  const page = root.ownerDocument;
  let path: HTMLElement[] = []; // from the element that had the focus last to the root
  let standIn: HTMLElement | null = null;
  const remember = (event: FocusEvent) => {
    if (event.target === standIn) return;
    forget();
    path = [];
    for (let at = event.target as HTMLElement | null; at; at = at.parentElement) {
      path.push(at);
      if (at === root) break;
    }
  };
  const forget = () => {
    standIn?.removeAttribute('tabindex');
    standIn = null;
  };
  // Whoever goes elsewhere, or clicks beside everything, gives the focus up on purpose; an element that is gone or
  // disabled by then has lost it.
  const leave = (event: FocusEvent) => {
    const left = event.target as HTMLElement;
    queueMicrotask(() => {
      const isUsable = root.contains(left) && !isOff(left);
      if (path[0] === left && isUsable && page.activeElement !== left) path = [];
    });
  };
  const look = () => {
    const last = path[0];
    if (!last) return;
    const isUsable = root.contains(last) && !isOff(last);
    if (standIn && isUsable) {
      const hadFocus = page.activeElement === standIn;
      forget();
      if (hadFocus) last.focus({ preventScroll: true });
    } else if (!isUsable && (hasNoFocus(page) || page.activeElement === last)) {
      forget();
      const around = path.find((element, at) => at > 0 && (element === root || root.contains(element)) && !isOff(element));
      if (around && !around.matches(FOCUSABLE)) {
        around.tabIndex = -1;
        standIn = around;
      }
      around?.focus({ preventScroll: true });
    }
  };
  root.addEventListener('focusin', remember);
  root.addEventListener('focusout', leave);
  const observer = new MutationObserver(look);
  observer.observe(root, { subtree: true, childList: true, attributes: true, attributeFilter: ['disabled'] });
  return () => {
    observer.disconnect();
    forget();
    root.removeEventListener('focusin', remember);
    root.removeEventListener('focusout', leave);
  };
}

/**
 * A question of which `area` is the element: `first` has the focus from the moment that the question can be seen, Esc
 * answers it with `onEscape`, and where it has gone the focus is where it was before.
 *
 * Esc is heard inside the area, and wherever nothing else does: where no element has the focus, or one around it.
 */
export function useQuestion(
  area: { current: HTMLElement | null },
  first: { current: HTMLElement | null },
  onEscape: () => void
): void {
  const latest = useRef(onEscape);
  latest.current = onEscape;
  // Before the browser draws: an effect would come a moment later, and a key that is pressed meanwhile would be lost.
  useLayoutEffect(() => {
    const element = area.current;
    if (!element) return;
    const page = element.ownerDocument;
    const before = page.activeElement as HTMLElement | null;
    first.current?.focus({ preventScroll: true });
    element.scrollIntoView?.({ block: 'nearest' }); // all of it, not only the button
    const onKeyDown = (event: KeyboardEvent) => {
      const target = event.target as Node;
      if (event.key === 'Escape' && (element.contains(target) || target.contains(element))) {
        event.preventDefault();
        event.stopImmediatePropagation();
        latest.current();
      }
    };
    page.addEventListener('keydown', onKeyDown, { capture: true });
    return () => {
      page.removeEventListener('keydown', onKeyDown, { capture: true });
      const hasFocus = element.contains(page.activeElement) || hasNoFocus(page);
      if (hasFocus && before && before !== page.body) {
        queueMicrotask(() => before.isConnected && before.focus({ preventScroll: true })); // it may be disabled until then
      }
    };
  }, []);
}
