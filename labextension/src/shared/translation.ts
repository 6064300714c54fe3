// Texts go through an object like JupyterLab's TranslationBundle; without JupyterLab they stay English.
import { createContext } from 'preact';
import { useContext } from 'preact/hooks';

/** What of JupyterLab's TranslationBundle is used; %1, %2, ... are replaced by the arguments. */
export interface Translation {
  __(text: string, ...args: (string | number)[]): string;
  _n(one: string, many: string, count: number, ...args: (string | number)[]): string;
}

const fill = (text: string, args: (string | number)[]) =>
  text.replace(/%(\d)/g, (found, at: string) => String(args[Number(at) - 1] ?? found));

export const ENGLISH: Translation = {
  __: (text, ...args) => fill(text, args),
  _n: (one, many, count, ...args) => fill(count === 1 ? one : many, [count, ...args])
};

export const TranslationContext = createContext<Translation>(ENGLISH);

export const useTrans = (): Translation => useContext(TranslationContext);
